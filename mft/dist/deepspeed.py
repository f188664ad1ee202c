"""DeepSpeed's ZeRO: the optimizer and the gradients (`Zero2`), and with `Zero3` the parameters too, divided over ranks.

The DeepSpeed engine is made and driven here: inside accelerate it would update the weights within `backward`, before
the ranks could agree that the step is finite, and clip at 1.0 where no clipping was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mft.dist.base import Engine, grouped
from mft.dist.pieces import Piece
from mft.errors import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

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
}
"""Keys of DeepSpeed's JSON that `dist.config` may not set -> the setting that says the same."""


class DeepSpeedEngine(Engine):
    """Drives a DeepSpeed engine. Every micro-batch exchanges gradients from stage 2 on: no rank keeps whole ones."""

    kinds = ("MULTI_CPU", "MULTI_GPU")
    wrapper = "DeepSpeedEngine"
    divided = True

    def __init__(self, accelerator: Accelerator, owns_group: bool, config: dict[str, Any], gather_on_save: bool = True):
        self.stage: int = config["zero_optimization"]["stage"]
        self.name = f"zero{self.stage}"
        super().__init__(accelerator, owns_group)
        self.config = config
        self.gather_on_save = gather_on_save
        self.sharded = self.stage == 3

    def loading(self) -> AbstractContextManager[None]:
        """Under ZeRO-3 transformers divides every weight while it loads: rank 0 reads it, each rank keeps its part.

        A model quantised while loading is divided in `prepare` instead.
        """
        return self._partitioned_loading() if self.stage == 3 else nullcontext()

    @contextmanager
    def _partitioned_loading(self) -> Iterator[None]:
        from transformers.integrations import HfDeepSpeedConfig
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        alive = HfDeepSpeedConfig(deepcopy(self.config))  # transformers looks for it by a weak reference
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del alive

    def prepare(self, module: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Returns the DeepSpeed engine and its optimizer. See `Engine.prepare`."""
        import deepspeed
        import torch

        self._require_trained(module)
        module.to(self.device)
        self._module, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepcopy(self.config), dist_init_required=False
        )
        if self.stage == 3:
            for weight in getattr(module, "direct_weights", list)():
                deepspeed.zero.register_external_parameter(module, weight)
        # DeepSpeed looks for infinities under fp16 only, but a NaN is to update nothing in any precision
        self._optimizer.check_grad_overflow = True
        self._require_wrapper()
        assert isinstance(self._module, torch.nn.Module)
        if self._module.zero_optimization_stage() != self.stage:  # type: ignore[operator]
            raise UserError(f"dist={self.name} did not come up as asked: DeepSpeed runs another stage")
        self._prove(next(self._module.parameters()))
        return self._module, self._optimizer

    def _prove(self, first: torch.nn.Parameter) -> None:
        if self.stage < 3:
            super()._prove(first)
        elif not hasattr(first, "ds_id"):
            raise UserError(f"dist={self.name} did not come up as asked: the first parameter is not partitioned")

    def autocast(self) -> AbstractContextManager[None]:
        """Nothing: DeepSpeed holds the parameters in the run's precision."""
        return nullcontext()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Tells DeepSpeed whether the optimizer's step follows this micro-batch."""
        assert self._module is not None, "prepare first"
        self._module.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, share: torch.Tensor) -> None:
        assert self._module is not None, "prepare first"
        self._module.backward(share * self.world, scale_wrt_gas=False)  # type: ignore[operator]

    def step(self, max_norm: float | None = None) -> float:
        """Lets DeepSpeed agree on finiteness, clip and update; see `Engine.step`."""
        assert self._module is not None, "prepare first"
        self._optimizer.clip_grad = max_norm or 0.0
        self._module.step()  # type: ignore[operator]
        overflow = bool(self._optimizer.overflow)
        self.skipped = overflow and self.accelerator.mixed_precision == "fp16"
        return float("nan") if overflow else float(self._module.get_global_grad_norm())  # type: ignore[operator]

    @contextmanager
    def gathered(self, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        """Context in which these parameters are whole on every rank."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def full_state(self, module: torch.nn.Module, trainable: bool = False, prefix: str = "") -> dict[str, torch.Tensor]:
        """One parameter after the other is gathered; rank 0 copies it to the CPU, the others return nothing.

        What is trained comes in fp32, as it is updated, also where it is computed with in half precision.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        inner = self.unwrap(module)
        state: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}  # a tied weight stays tied
        for name, parameter in inner.named_parameters(remove_duplicate=trainable):
            if (trainable and not parameter.requires_grad) or not name.startswith(prefix):
                continue
            if id(parameter) not in copies:
                with self.gathered([] if parameter.requires_grad else [parameter]):
                    whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter.detach()
                    copies[id(parameter)] = whole.to("cpu", copy=True) if self.is_main else whole.new_empty(0)
            if self.is_main:
                state[name.removeprefix(prefix)] = copies[id(parameter)]
        if not trainable and self.is_main:
            kept = set(inner.state_dict())  # without the buffers that are not saved
            for name, buffer in inner.named_buffers():
                if name in kept and name.startswith(prefix):
                    state[name.removeprefix(prefix)] = buffer.detach()
        return state

    def _pieces(self) -> list[Piece]:
        """Returns the runs of each trained parameter that lie in this rank's part of DeepSpeed's flat fp32 buffers."""
        assert self._module is not None, "prepare first"
        zero, found = self._optimizer, []
        parameters: Iterator[tuple[str, Any]] = self.unwrap(self._module).named_parameters()
        for name, parameter in parameters:
            if not parameter.requires_grad:
                continue
            if self.stage == 3:
                group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
                owner = zero.fp32_partitioned_groups_flat[group]
                start = self.rank * part
                numel = min(part, parameter.ds_numel - start)  # without the padding at the end
            elif parameter._hp_mapping is None:
                continue  # all of it is in other ranks' parts
            else:
                mapping = parameter._hp_mapping
                owner = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
                start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                numel = mapping.hp_fragment_address.numel
            if numel > 0:
                found.append(Piece(name, start, owner.detach().narrow(0, offset, numel), owner, offset))
        return found

    def _settle(self) -> None:
        """Copies the fp32 weights into the ones that are computed with, on all ranks."""
        zero = self._optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()

    def _scaler_state(self) -> dict[str, Any]:
        if self.accelerator.mixed_precision != "fp16":
            return {}
        values = vars(self._optimizer.loss_scaler).items()
        return {name: value for name, value in values if isinstance(value, int | float)}

    def _load_scaler(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self._optimizer.loss_scaler, name, value)

    def close(self) -> None:
        if self._module is not None:
            self._module.destroy()  # type: ignore[operator]
        super().close()


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns base with the values of `over` put in, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


def refuse_decided(config: Mapping[str, Any]) -> None:
    """Raises UserError for a key of DeepSpeed's JSON that another setting decides."""
    for key, setting in OURS.items():
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            raise UserError(f"dist.config.{key} is decided by {setting}; set that instead")


def start(
    precision: str,
    cpu: bool | None,
    zero: Callable[[bool], dict[str, Any]],
    over: Mapping[str, Any],
    gather_on_save: bool = True,
) -> DeepSpeedEngine:
    """Returns the engine of this rank. precision: bf16, fp16 or fp32; cpu: None takes a GPU where there is one.

    zero: makes the zero_optimization part for a machine with or without GPU; over: merged over the whole JSON.
    Raises UserError when the device cannot do the precision or the group is not what was asked.
    """
    accelerator, owns_group = grouped(precision, cpu)
    gpu = accelerator.device.type != "cpu"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")
    config: dict[str, Any] = {
        # one micro-batch a step as DeepSpeed sees it: the engine scales by the whole step, and says when it ends
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero(gpu),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
    if accelerator.mixed_precision != "no":
        config[accelerator.mixed_precision] = {"enabled": True}
    return DeepSpeedEngine(accelerator, owns_group, merged(config, over), gather_on_save)


@dataclass
class Zero2:
    """DeepSpeed ZeRO stage 2: each rank holds all parameters, and its part of the gradients and of the optimizer.

    stage: 2, or 1 (the gradients whole too, exchanged once a step); offload_optimizer: keep the optimizer's part in the
    CPU's memory and update there; bucket sizes in elements; overlap_comm: exchange during backward (GPU only);
    config: further keys of DeepSpeed's JSON, merged over ours.
    """

    stage: int = 2
    offload_optimizer: bool = False
    reduce_bucket_size: int = 200_000_000
    allgather_bucket_size: int = 200_000_000
    overlap_comm: bool = True
    config: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError for a stage of another class, and for keys of `config` that another setting decides."""
        if self.stage not in (1, 2):
            raise UserError(f"dist.stage={self.stage}: dist=zero2 has stages 1 and 2; stage 3 is dist=zero3")
        refuse_decided(self.config)

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
        return start(precision, cpu, self.zero, self.config)


@dataclass
class Zero3:
    """DeepSpeed ZeRO stage 3: each rank holds its part of parameters, gradients and optimizer; layers are gathered
    while they compute.

    offload_optimizer, offload_parameters: keep these parts in the CPU's memory; sizes in elements;
    prefetch_bucket_size: gathered ahead of use; persistence_threshold: smaller ones stay whole; max_live_parameters:
    whole at a time; gather_on_save: checkpoints hold the model as transformers or peft load it, else the sharded state
    only (`final/` is whole anyway); config: further keys of DeepSpeed's JSON, merged over ours.
    """

    divides_on_load = True  # not a field: a rank never holds a whole weight
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket_size: int = 200_000_000
    prefetch_bucket_size: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    overlap_comm: bool = True
    gather_on_save: bool = True
    config: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError for keys of `config` that another setting decides."""
        refuse_decided(self.config)

    def start(self, precision: str, cpu: bool | None = None) -> DeepSpeedEngine:
        """Returns the engine of this rank; see `start`."""
        self.check()
        return start(precision, cpu, self.zero, self.config, self.gather_on_save)

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
