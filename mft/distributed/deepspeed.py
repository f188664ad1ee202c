"""DeepSpeed's ZeRO as settings: optimizer and gradients (`Zero2`), and with `Zero3` the parameters too, are
sharded over ranks. The settings become DeepSpeed's JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

from mft.distributed.deepspeed_engine import DeepSpeedEngine, compile_nothing
from mft.distributed.process_group import GroupBackend, number_own_device
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


def refuse_decided(config: Mapping[str, Any]) -> None:
    """Raises UserError for a key of DeepSpeed's JSON that another setting decides."""
    for key, setting in OURS.items():
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            raise UserError(f"dist.config.{key} is decided by {setting}; set that instead")


def refuse_unknown(config: Mapping[str, Any]) -> None:
    """Raises UserError for a key of `zero_optimization` that DeepSpeed does not have."""
    if not (zero := config.get("zero_optimization")):
        return  # DeepSpeed, which takes seconds to import, has nothing to judge
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    names = set(fields) | {field.alias for field in fields.values() if field.alias}
    for key in zero:
        if key not in names:
            hint = nearest(key, names)
            raise UserError(f"dist.config.zero_optimization.{key}: DeepSpeed has no such key{hint}")


@dataclass
class Zero(GroupBackend):
    """What both backends of DeepSpeed have in common."""

    casts_weights: ClassVar[bool] = True
    """DeepSpeed holds the weights in the run's precision."""

    offload_optimizer: bool = False
    """Keep this rank's part of the optimizer in the CPU's memory and update there."""
    reduce_bucket_size: int = ranged(200_000_000, min=1)
    """Gradients exchanged at a time, in elements, at most all that are trained; larger is faster and needs
    that much memory twice."""
    overlap_comm: bool = True
    """Overlap the exchange of gradients with the backward pass (GPU only)."""
    config: dict[str, Any] | None = None
    """Further keys of DeepSpeed's JSON, merged over ours."""

    def check(self) -> None:
        """Raises UserError for keys of `config` that another setting decides or that DeepSpeed lacks."""
        refuse_decided(self.config or {})
        refuse_unknown(self.config or {})

    def zero(self, gpu: bool) -> dict[str, Any]:
        """Returns the zero_optimization part of DeepSpeed's JSON."""
        options: dict[str, Any] = {
            "reduce_bucket_size": self.reduce_bucket_size,
            "overlap_comm": self.overlap_comm and gpu,
            "contiguous_gradients": True,
        }
        if self.offload_optimizer:
            options["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
        return options

    def bytes_per_trained_weight(self, half: bool) -> dict[str, int]:
        if not half:
            return super().bytes_per_trained_weight(half)
        return {"weights": 2, "gradients": 2, "optimizer": 4}  # a copy in fp32 is what is updated

    def start(self, precision: str, cpu: bool | None = None) -> DeepSpeedEngine:
        """Also raises UserError for a `config` that DeepSpeed does not take."""
        self.check()
        if not cpu:
            number_own_device()
        accelerator, owns_group = self.grouped(precision, cpu)
        gpu = accelerator.device.type != "cpu"
        # else DeepSpeed takes a GPU it finds, also where the engine is started with cpu=True
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")
        if not gpu:
            compile_nothing()
        config: dict[str, Any] = {
            # one micro-batch a step, as DeepSpeed sees it: the engine scales and says when a step ends
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": self.zero(gpu),
            # any optimizer of ours, also one whose state is offloaded to the CPU
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,  # never
        }
        if accelerator.mixed_precision != "no":
            config[accelerator.mixed_precision] = {"enabled": True}
        if self.config:
            config = self._merged_over(config)
        return DeepSpeedEngine(accelerator, owns_group, config)

    def _merged_over(self, config: dict[str, Any]) -> dict[str, Any]:
        import deepspeed
        from accelerate.utils import merge_dicts

        try:
            config = merge_dicts(self.config, config)
            deepspeed.DeepSpeedConfig(deepcopy(config))
        except Exception as error:  # each part of DeepSpeed has its own kind of error
            reason = " ".join(str(error).split())
            raise UserError(f"dist.config: DeepSpeed does not take it: {reason}") from error
        return config


@dataclass
class Zero2(Zero):
    """ZeRO stage 2: each rank holds all parameters, and its part of the gradients and of the optimizer."""

    public_name: ClassVar[str] = "zero2"

    stage: int = 2
    """2, or 1: gradients are not sharded either, and are reduced once per step."""
    allgather_bucket_size: int = ranged(200_000_000, min=1)
    """Parameters gathered at a time after the update, in elements, at most all that are trained."""

    def check(self) -> None:
        """Also raises UserError for a stage of another class and for an odd size."""
        if self.stage not in (1, 2):
            raise UserError(f"dist.stage={self.stage}: dist=zero2 has stages 1 and 2; stage 3 is dist=zero3")
        if (size := self.allgather_bucket_size) % 2:
            raise UserError(f"dist.allgather_bucket_size={size}: DeepSpeed wants an even number")
        super().check()

    def divided_parts(self) -> set[str]:
        return {"optimizer", "gradients"} if self.stage == 2 else {"optimizer"}

    def zero(self, gpu: bool) -> dict[str, Any]:
        own = {"stage": self.stage, "allgather_bucket_size": self.allgather_bucket_size}
        return super().zero(gpu) | own


@dataclass
class Zero3(Zero):
    """ZeRO stage 3: each rank holds its part of parameters, gradients and optimizer.

    A layer is gathered while it computes.
    """

    public_name: ClassVar[str] = "zero3"
    divides_on_load: ClassVar[bool] = True

    offload_parameters: bool = False
    """Keep this rank's part of the parameters in the CPU's memory; slower still."""
    prefetch_bucket_size: int = ranged(50_000_000, min=0)
    """Parameters gathered ahead of their use, in elements."""
    persistence_threshold: int = ranged(100_000, min=0)
    """Parameters of at most this many elements are kept in full on every rank."""
    max_live_parameters: int = ranged(1_000_000_000, min=1)
    """Most elements gathered at a time; lower saves memory and gathers more often."""
    gather_on_save: bool = True
    """Whether checkpoints also hold the model as transformers or peft load it; `final/` does in any case."""

    def divided_parts(self) -> set[str]:
        return {"weights", "gradients", "optimizer"}

    def zero(self, gpu: bool) -> dict[str, Any]:
        options = super().zero(gpu) | {
            "stage": 3,
            "stage3_prefetch_bucket_size": self.prefetch_bucket_size,
            "stage3_param_persistence_threshold": self.persistence_threshold,
            "stage3_max_live_parameters": self.max_live_parameters,
            "stage3_gather_16bit_weights_on_model_save": self.gather_on_save,
        }
        if self.offload_parameters:
            options["offload_param"] = {"device": "cpu", "pin_memory": gpu}
        return options

    def start(self, precision: str, cpu: bool | None = None) -> DeepSpeedEngine:
        engine = super().start(precision, cpu)
        engine.gather_on_save = self.gather_on_save
        return engine
