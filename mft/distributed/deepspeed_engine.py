"""The engine of DeepSpeed's ZeRO: optimizer, gradients and, in stage 3, parameters sharded over the ranks.

The DeepSpeed engine is made and driven here: inside accelerate it would update the weights within `backward`,
before the ranks could agree that the step is finite, and clip at 1.0 where no clipping was asked for.

All that is private of DeepSpeed is here (read in 0.19); tests/distributed/test_private_apis.py holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from mft.distributed.accelerator import environment
from mft.distributed.engine import Engine, T
from mft.distributed.sharded_state import Shard
from mft.errors import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


class DeepSpeedEngine(Engine):
    """Drives a DeepSpeed engine. Every micro-batch exchanges gradients from stage 2 on: no rank keeps whole
    ones."""

    kinds = ("MULTI_CPU", "MULTI_GPU")
    wrapper = "DeepSpeedEngine"
    divided = True

    def __init__(
        self, accelerator: Accelerator, owns_group: bool, config: dict[str, Any], gather_on_save: bool = True
    ):
        self.stage: int = config["zero_optimization"]["stage"]
        self.name = f"zero{self.stage}"
        super().__init__(accelerator, owns_group)
        self.config = config
        self.gather_on_save = gather_on_save
        self.sharded = self.stage == 3

    def loading(self) -> AbstractContextManager[None]:
        """Under ZeRO-3 transformers divides every weight while it loads: rank 0 reads it, each rank keeps its
        part.

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
        with environment(
            {"LOCAL_RANK": str(self.local_rank)}
        ):  # asked for, though unused; launch=inline has none
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
            raise UserError(f"dist={self.name} did not start as configured: DeepSpeed runs another stage")
        self._verify_sharding(next(self._module.parameters()))
        return self._module, self._optimizer

    def _verify_sharding(self, first: torch.nn.Parameter) -> None:
        if self.stage < 3:
            super()._verify_sharding(first)
        elif not hasattr(first, "ds_id"):
            raise UserError(
                f"dist={self.name} did not start as configured: the first parameter is not partitioned"
            )

    def run_as_forward(self, call: Callable[[], T]) -> T:
        """See `Engine.inside`; DeepSpeed holds the parameters in the run's precision."""
        return self._in_place_of_forward(call) if self.stage == 3 else call()

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

    def full_state(
        self, module: torch.nn.Module, trainable: bool = False, prefix: str = ""
    ) -> dict[str, torch.Tensor]:
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
                    whole = (
                        safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter.detach()
                    )
                    copies[id(parameter)] = whole.to("cpu", copy=True) if self.is_main else whole.new_empty(0)
            if self.is_main:
                state[name.removeprefix(prefix)] = copies[id(parameter)]
        if not trainable and self.is_main:
            kept = set(inner.state_dict())  # without the buffers that are not saved
            for name, buffer in inner.named_buffers():
                if name in kept and name.startswith(prefix):
                    state[name.removeprefix(prefix)] = buffer.detach()
        return state

    def _shards(self) -> list[Shard]:
        """Returns the runs of each trained parameter that lie in this rank's part of DeepSpeed's flat fp32
        buffers."""
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
                found.append(Shard(name, start, owner.detach().narrow(0, offset, numel), owner, offset))
        return found

    def _sync_computed_weights(self) -> None:
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
