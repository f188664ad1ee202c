"""DeepSpeed's ZeRO as settings: the optimizer and the gradients (`Zero2`), and with `Zero3` the parameters
too, divided over ranks. What they say becomes DeepSpeed's JSON.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

from mft.distributed import build_lock
from mft.distributed.accelerator import grouped
from mft.distributed.deepspeed_engine import DeepSpeedEngine
from mft.distributed.engine import Backend
from mft.errors import UserError, nearest, ranged

OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "fp16.enabled": "train.precision",
    "bf16.enabled": "train.precision",
    "zero_optimization.stage": "dist",
    "zero_optimization.reduce_bucket_size": "dist.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "dist.allgather_bucket_size",
    "zero_optimization.overlap_comm": "dist.overlap_comm",
    "zero_optimization.stage3_prefetch_bucket_size": "dist.prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold": "dist.persistence_threshold",
    "zero_optimization.stage3_max_live_parameters": "dist.max_live_parameters",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "dist.gather_on_save",
}
"""Keys of DeepSpeed's JSON that `dist.config` may not set -> the setting that says the same."""


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns base with the values of `over` put in, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        inner = result.get(key)
        result[key] = (
            merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def refuse_decided(config: Mapping[str, Any]) -> None:
    """Raises UserError for a key of DeepSpeed's JSON that another setting decides."""
    for key, setting in OURS.items():
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            raise UserError(f"dist.config.{key} is decided by {setting}; set that instead")


def refuse_unknown(config: Mapping[str, Any]) -> None:
    """Raises UserError for a key of `zero_optimization` that DeepSpeed does not have; imports it if there are
    any."""
    if not (given := config.get("zero_optimization")):
        return
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = DeepSpeedZeroConfig.model_fields
    names = set(known) | {field.alias for field in known.values() if field.alias}
    for key in given:
        if key not in names:
            raise UserError(
                f"dist.config.zero_optimization.{key}: DeepSpeed has no such key{nearest(key, names)}"
            )


def refuse_invalid(config: Mapping[str, Any]) -> None:
    """Raises UserError for what DeepSpeed cannot read: a key unknown to its zero_optimization, a wrong
    value."""
    import deepspeed

    refuse_unknown(config)
    try:
        deepspeed.DeepSpeedConfig(deepcopy(dict(config)))
    except Exception as error:  # each part of DeepSpeed has its own kind of error
        raise UserError(f"dist.config: DeepSpeed does not take it: {' '.join(str(error).split())}") from error


def start(
    precision: str,
    cpu: bool | None,
    zero: Callable[[bool], dict[str, Any]],
    over: Mapping[str, Any],
    gather_on_save: bool = True,
) -> DeepSpeedEngine:
    """Returns the engine of this rank. precision: bf16, fp16 or fp32; cpu: None takes a GPU where there is
    one.

    zero: makes the zero_optimization part for a machine with or without GPU; over: merged over the whole
    JSON. Raises UserError when the device cannot do the precision or the group is not what was asked.
    """
    accelerator, owns_group = grouped(precision, cpu)
    gpu = accelerator.device.type != "cpu"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")
    if not gpu:
        build_lock.load()
    config: dict[str, Any] = {
        # one micro-batch a step as DeepSpeed sees it: the engine scales by the whole step, and says when it
        # ends
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero(gpu),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
    if accelerator.mixed_precision != "no":
        config[accelerator.mixed_precision] = {"enabled": True}
    config = merged(config, over)
    if over:
        refuse_invalid(config)
    return DeepSpeedEngine(accelerator, owns_group, config, gather_on_save)


@dataclass
class Zero2(Backend):
    """DeepSpeed ZeRO stage 2: each rank holds all parameters, and its part of the gradients and of the
    optimizer."""

    public_name: ClassVar[str] = "zero2"
    casts_weights: ClassVar[bool] = True
    """DeepSpeed holds the weights in the run's precision."""

    stage: int = 2
    """2, or 1: the gradients stay whole, too, and are exchanged once a step."""
    offload_optimizer: bool = False
    """Keep this rank's part of the optimizer in the CPU's memory and update there."""
    reduce_bucket_size: int = ranged(200_000_000, min=1)
    """Gradients exchanged at a time, in elements; larger is faster and needs that much memory twice."""
    allgather_bucket_size: int = ranged(200_000_000, min=1)
    """Parameters gathered at a time after the update, in elements."""
    overlap_comm: bool = True
    """Overlap the exchange of gradients with the backward pass (GPU only)."""
    config: dict[str, Any] | None = None
    """Further keys of DeepSpeed's JSON, merged over ours."""

    def check(self) -> None:
        """Raises UserError for a stage of another class, an odd size, and keys of `config` that a setting
        decides."""
        if self.stage not in (1, 2):
            raise UserError(f"dist.stage={self.stage}: dist=zero2 has stages 1 and 2; stage 3 is dist=zero3")
        if self.allgather_bucket_size % 2:
            raise UserError(
                f"dist.allgather_bucket_size={self.allgather_bucket_size}: DeepSpeed wants an even number"
            )
        refuse_decided(self.config or {})
        refuse_unknown(self.config or {})

    def zero(self, gpu: bool) -> dict[str, Any]:
        """Returns the zero_optimization part of DeepSpeed's JSON."""
        return {
            "stage": self.stage,
            "reduce_bucket_size": self.reduce_bucket_size,
            "allgather_bucket_size": self.allgather_bucket_size,
            "overlap_comm": self.overlap_comm and gpu,
            "contiguous_gradients": True,
        } | ({"offload_optimizer": {"device": "cpu", "pin_memory": gpu}} if self.offload_optimizer else {})

    def start(self, precision: str, cpu: bool | None = None) -> DeepSpeedEngine:
        """Returns the engine of this rank; see `start`."""
        self.check()
        return start(precision, cpu, self.zero, self.config or {})


@dataclass
class Zero3(Backend):
    """DeepSpeed ZeRO stage 3: each rank holds its part of parameters, gradients and optimizer; layers are
    gathered while they compute.
    """

    public_name: ClassVar[str] = "zero3"
    divides_on_load: ClassVar[bool] = True
    casts_weights: ClassVar[bool] = True
    offload_optimizer: bool = False
    """Keep this rank's part of the optimizer in the CPU's memory and update there."""
    offload_parameters: bool = False
    """Keep this rank's part of the parameters in the CPU's memory; slower still."""
    reduce_bucket_size: int = ranged(200_000_000, min=1)
    """Gradients exchanged at a time, in elements."""
    prefetch_bucket_size: int = ranged(50_000_000, min=0)
    """Parameters gathered ahead of their use, in elements."""
    persistence_threshold: int = ranged(100_000, min=0)
    """Parameters of at most so many elements stay whole on every rank."""
    max_live_parameters: int = ranged(1_000_000_000, min=1)
    """Elements that are whole at a time, at most; lower saves memory and gathers more often."""
    overlap_comm: bool = True
    """Overlap the exchange of gradients with the backward pass (GPU only)."""
    gather_on_save: bool = True
    """Whether checkpoints also hold the model as transformers or peft load it; `final/` does in any case."""
    config: dict[str, Any] | None = None
    """Further keys of DeepSpeed's JSON, merged over ours."""

    def check(self) -> None:
        """Raises UserError for keys of `config` that another setting decides."""
        refuse_decided(self.config or {})
        refuse_unknown(self.config or {})

    def start(self, precision: str, cpu: bool | None = None) -> DeepSpeedEngine:
        """Returns the engine of this rank; see `start`."""
        self.check()
        return start(precision, cpu, self.zero, self.config or {}, self.gather_on_save)

    def zero(self, gpu: bool) -> dict[str, Any]:
        """Returns the zero_optimization part of DeepSpeed's JSON."""
        device = {"device": "cpu", "pin_memory": gpu}
        return {
            "stage": 3,
            "reduce_bucket_size": self.reduce_bucket_size,
            "stage3_prefetch_bucket_size": self.prefetch_bucket_size,
            "stage3_param_persistence_threshold": self.persistence_threshold,
            "stage3_max_live_parameters": self.max_live_parameters,
            "stage3_gather_16bit_weights_on_model_save": self.gather_on_save,
            "overlap_comm": self.overlap_comm and gpu,
            "contiguous_gradients": True,
            **({"offload_optimizer": device} if self.offload_optimizer else {}),
            **({"offload_param": device} if self.offload_parameters else {}),
        }
