"""The engine of DeepSpeed's ZeRO: optimizer, gradients and, in stage 3, parameters sharded over the ranks.

The DeepSpeed engine is made and driven here: inside accelerate it would update the weights within `backward`,
before the ranks could agree that the step is finite, and clip at 1.0 where no clipping was asked for.

All that is private of DeepSpeed is here (read in 0.19); tests/distributed/test_private_apis.py holds it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from mft.distributed.engine import Engine
from mft.distributed.ranks import T
from mft.distributed.sharded_state import Shard

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def compile_nothing() -> None:
    """Keeps DeepSpeed from compiling an op for CPUs, which takes minutes and a compiler.

    It adds numbers up through shared memory for tensor parallelism, and nothing here calls it. DeepSpeed
    looks it up among the ops that it finds compatible, and goes on without it.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def limit_buckets(zero: dict[str, Any], trained: int) -> None:
    """Limits the buckets of DeepSpeed's zero_optimization to the elements that are trained.

    DeepSpeed allocates whole buckets, on the device and for the run, also where an adapter fills a part of
    one.
    """
    zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], trained)
    if "allgather_bucket_size" in zero:  # stages 1 and 2; an even number
        zero["allgather_bucket_size"] = min(zero["allgather_bucket_size"], trained + trained % 2)


class DeepSpeedEngine(Engine):
    """Drives a DeepSpeed engine. From stage 2 on each micro-batch exchanges gradients: no rank keeps all."""

    kinds = ("MULTI_CPU", "MULTI_GPU")
    wrapper = "DeepSpeedEngine"
    divided = True

    def __init__(self, accelerator: Accelerator, owns_group: bool, config: dict[str, Any]):
        self.stage: int = config["zero_optimization"]["stage"]
        self.name = f"zero{self.stage}"
        self.parameters = "partitioned" if self.stage == 3 else "whole"
        super().__init__(accelerator, owns_group)
        self.config = config
        # DeepSpeed reads the variable while loading and in every step; launch=inline has none
        self._sets_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))

    @contextmanager
    def loading(self, quantised: bool = False) -> Iterator[torch.device | None]:
        """Under ZeRO-3 transformers divides each weight as rank 0 reads it; every rank keeps its part.

        A model quantised while loading is divided in `prepare` instead, and packed in the CPU's memory until
        then: transformers would put the whole model on the device.
        """
        import torch
        from transformers.integrations import HfDeepSpeedConfig
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        if self.stage < 3 or quantised:
            yield self.device if self.stage < 3 else torch.device("cpu")
            return
        # transformers looks for it by a weak reference: the name keeps it alive
        alive = HfDeepSpeedConfig(deepcopy(self.config))
        try:
            yield None
        finally:
            unset_hf_deepspeed_config()
            del alive

    def _wrap(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        import deepspeed

        config = deepcopy(self.config)
        trained = sum(self._numel(p) for group in optimizer.param_groups for p in group["params"])
        limit_buckets(config["zero_optimization"], trained)
        if self.stage == 3:
            self._divide(module, config)
        module.to(self.device)
        engine, zero, _, _ = deepspeed.initialize(
            None, module, optimizer, dist_init_required=False, config=config
        )
        if self.stage == 3:
            # weights that a module uses without calling their owner, so that no hook would gather them
            for weight in getattr(module, "direct_weights", list)():
                deepspeed.zero.register_external_parameter(module, weight)
        # DeepSpeed looks for infinities under fp16 only, but a NaN is to update nothing in any precision
        zero.check_grad_overflow = True
        if engine.zero_optimization_stage() != self.stage:
            raise self._misconfigured("DeepSpeed runs another stage")
        return engine, zero

    def _divide(self, module: torch.nn.Module, config: dict[str, Any]) -> None:
        """Divides a module that was loaded whole, weight by weight, each in the run's precision.

        DeepSpeed's engine would first move all of it to the device.
        """
        import deepspeed
        import torch

        if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            return  # while it was loaded
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        for parameter in module.parameters() if half else ():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(half)
        deepspeed.zero.Init(module=module, config_dict_or_path=config)

    def run_as_forward(self, call: Callable[[], T]) -> T:
        # without autocast: DeepSpeed holds the parameters in the run's precision
        return super().run_as_forward(call) if self.sharded else call()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Tells DeepSpeed whether the optimizer's step follows this micro-batch."""
        self._module.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, share: torch.Tensor) -> None:
        # share has the denominators of the whole step: DeepSpeed must not divide by the micro-batches again
        self._module.backward(share * self.world, scale_wrt_gas=False)

    def step(self, max_norm: float | None = None) -> float:
        """Lets DeepSpeed agree on finiteness, clip and update; see `Engine.step`."""
        self._optimizer.clip_grad = max_norm or 0.0
        self._module.step()
        overflow = bool(self._optimizer.overflow)
        self.skipped = overflow and self.accelerator.mixed_precision == "fp16"
        return float("nan") if overflow else float(self._module.get_global_grad_norm())

    def _drop_gradients(self) -> None:
        scaler = self._scaler_state()
        logging.disable(logging.WARNING)  # of an overflow
        try:
            self._module.step()  # not finite, so that it updates nothing and clears everything
        finally:
            logging.disable(logging.NOTSET)
        assert self._optimizer.overflow
        self._load_scaler(scaler)

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of what is trained it takes the fp32 master weight, also where half precision is computed with."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        # only frozen shards: safe_get_full_fp32_param gathers the trained ones
        frozen_shard = hasattr(tensor, "ds_id") and not tensor.requires_grad
        with deepspeed.zero.GatheredParameters([tensor], enabled=frozen_shard):
            full: torch.Tensor = tensor.detach()
            if tensor.requires_grad:
                full = safe_get_full_fp32_param(tensor)
            return full.to("cpu", copy=True) if self.is_main else full.new_empty(0)

    def _numel(self, tensor: torch.Tensor) -> int:
        return int(getattr(tensor, "ds_numel", tensor.numel()))  # of which ZeRO-3 keeps a part on a rank

    def _shards(self) -> list[Shard]:
        """Returns the runs of each trained parameter in this rank's part of DeepSpeed's flat fp32 buffers."""
        zero, shards = self._optimizer, []
        parameter: Any  # with the attributes that DeepSpeed has given it
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage == 3:
                group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
                owner = zero.fp32_partitioned_groups_flat[group]
                start = self.rank * part
                numel = min(part, parameter.ds_numel - start)  # without the padding at the end
            elif (mapping := parameter._hp_mapping) is None:  # hp: high precision, lp: low precision
                continue  # all of it is in other ranks' parts
            else:
                owner = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
                start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                numel = mapping.hp_fragment_address.numel
            if numel > 0:
                shards.append(Shard(name, start, owner.detach().narrow(0, offset, numel), owner, offset))
        return shards

    def _sync_computed_weights(self) -> None:
        """Copies the fp32 weights into the ones that are computed with, on all ranks."""
        zero = self._optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        # the prologue partitions what is still gathered, the epilogue gathers the persistent parameters again
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()

    def _scaler_state(self) -> dict[str, Any]:
        if self.accelerator.mixed_precision != "fp16":
            return {}
        # DeepSpeed's scaler has no state_dict; its state are its numbers
        values = vars(self._optimizer.loss_scaler).items()
        return {name: value for name, value in values if isinstance(value, int | float)}

    def _load_scaler(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self._optimizer.loss_scaler, name, value)

    def close(self) -> None:
        if self._module is not None:
            self._module.destroy()
        if self._sets_local_rank:
            os.environ.pop("LOCAL_RANK", None)
        super().close()
