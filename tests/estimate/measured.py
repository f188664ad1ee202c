"""What the tensors of a rank hold in a real training step, by part: the other side of an estimate.

The ledger books every storage of the process, from before the model is loaded on, and asks the engine at the
end which of them are weights, gradients and states. It is held against torch's profiler, which counts what
the allocator was asked for.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from mft.config.build import build_components
from mft.config.compose import compose_resolved
from mft.distributed.engine import Engine
from mft.distributed.sharded_state import local
from mft.model.peft.full import compute_dtype
from mft.model.step_trace import Rows
from mft.model.tensor_ledger import Ledger
from mft.model.token_loss import TokenLoss, vocabulary

GATHERING = ("partition_parameters.py", "partitioned_param_coordinator.py", "_fsdp_param.py")
REDUCING = ("setup_buckets", "reduce_ipg_grads", "average_tensor", "__reduce_and_partition_ipg_grads")


class Named:
    """Says what a new storage is part of, by where it is made."""

    def __init__(self) -> None:
        self.vocabulary = 0
        self.weights: set[int] = set()

    def __call__(self, result: torch.Tensor, func: Any, args: Any) -> str | None:
        frame: Any = sys._getframe(1)
        for _ in range(40):
            if frame is None:
                break
            file = frame.f_code.co_filename.rpartition("/")[2]
            if file in GATHERING or (file == "_fsdp_collectives.py" and "gather" in frame.f_code.co_name):
                return "gathers"
            reducing = file == "_fsdp_collectives.py" and "reduce" in frame.f_code.co_name
            if reducing or frame.f_code.co_name in REDUCING:
                return "buckets"
            frame = frame.f_back
        if result.dim() == 2 and result.shape[-1] == self.vocabulary:
            return "logits"
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights:
            return "copies"
        return None


@contextmanager
def resizing(ledger: Ledger) -> Iterator[None]:
    """Lets a ledger know of storages that are freed by being resized, as fsdp does it."""
    resize = torch.UntypedStorage.resize_

    def booked(self: torch.UntypedStorage, size: int) -> Any:
        found = resize(self, size)
        ledger.resized(self)
        return found

    torch.UntypedStorage.resize_ = booked  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


@contextmanager
def settling() -> Iterator[None]:
    """Waits after each sum over ranks until gloo's threads have let go of its tensors, which they do sooner
    or later than the next ones are made."""
    reduce = torch.distributed.all_reduce

    def settled(*args: Any, **kwargs: Any) -> Any:
        found = reduce(*args, **kwargs)
        time.sleep(0.02)
        return found

    torch.distributed.all_reduce = settled
    try:
        yield
    finally:
        torch.distributed.all_reduce = reduce


def one_step(engine: Engine, module: Any, batch: Any, accumulation: int, watch: Any = None) -> None:
    for number in range(accumulation):
        with engine.accumulating(last=number == accumulation - 1):
            nll_BT, router = module(batch)
            engine.backward(nll_BT.sum() / nll_BT.numel() + router)
            del nll_BT, router
        if watch:
            watch()  # also between micro-batches, when an engine may keep whole gradients
    engine.step(1.0)


def own(ledger: Ledger, engine: Engine, optimizer: Any) -> None:
    """Tells the ledger what the engine keeps."""
    model, inner = engine.model, optimizer
    zero = engine._optimizer
    # what ZeRO-3 has gathered is none of it, unless it stays so
    whole = [p for p in model.parameters() if getattr(p, "ds_persist", True)]
    weights = [local(p.data) for p in whole]
    weights += [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    weights += list(getattr(zero, "bit16_groups_flat", []))
    weights += list(getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", []))
    ledger.own(weights, "weights")
    states: list[torch.Tensor] = []
    for kept in inner.state.values():
        states += [local(v) for v in kept.values() if torch.is_tensor(v)]
    states += [p.data for p in updated(zero)]
    ledger.own(states, "optimizer")
    offloading = ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload")
    ledger.own([getattr(zero, name) for name in offloading if hasattr(zero, name)], "buckets")
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            ledger.own([state.absmax, state.code], "weights")
            state = state.state2


def updated(zero: Any) -> list[torch.Tensor]:
    """Returns the float32 copies that DeepSpeed's optimizer updates."""
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return [p for name in names for p in getattr(zero, name, [])]


def own_gradients(ledger: Ledger, engine: Engine) -> None:
    zero = engine._optimizer
    found = whole_gradients(engine.model)
    found += [local(p.grad) for p in engine.model.parameters() if p.grad is not None]
    for group in getattr(zero, "averaged_gradients", {}).values():
        found += [g for g in (group or []) if torch.is_tensor(g)]
    flat = getattr(zero, "grad_partitions_flat_buffer", None)
    found += [flat] if flat is not None else []
    found += [p.grad for p in updated(zero) if p.grad is not None]
    ledger.own(found, "gradients")
    for bucket in getattr(zero, "ipg_buckets", {}).values():
        buffers = getattr(bucket, "buffer", None)
        ledger.own([buffers] if torch.is_tensor(buffers) else buffers or [], "buckets")


def whole_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Returns the gradients that fsdp keeps whole until the last micro-batch."""
    found = []
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if hasattr(module, "_get_fsdp_state") else None
        for each in group.fsdp_params if group else ():
            found += [each.unsharded_accumulated_grad, getattr(each, "_unsharded_param", None)]
    found = [getattr(each, "grad", None) if isinstance(each, torch.nn.Parameter) else each for each in found]
    return [each for each in found if each is not None]


def measured(overrides: list[str], rows: Rows) -> dict[str, Any]:
    """Loads and trains the model of a config on this rank; returns in bytes, by part, the peak of the third
    and fourth steps ("parts"), how far it is above their beginning ("rise"), and the same of the fifth and
    sixth by torch's profiler ("profiler"); and the process's peak, which earlier ones have raised ("rss")."""
    cfg = compose_resolved(overrides)
    components = build_components(cfg)
    backend, peft, family = components.dist, components.peft, components.model
    precision = cfg.train.precision.value
    engine = backend.start(precision, cpu=True)
    torch.manual_seed(0)
    naming = Named()
    ledger = Ledger(naming)
    batch = rows.batch()
    accumulation = int(cfg.train.gradient_accumulation_steps or 1)
    with ledger, resizing(ledger), settling():
        quantised = peft.quantization(compute_dtype(precision), backend.casts_weights_to(precision))
        with engine.loading(quantised is not None) as device:
            model = family.model(
                peft.dtype(precision), quantised, compute_dtype=compute_dtype(precision), device=device
            )
        model = peft.attach(model, family)
        family.checkpoint(model)
        module: Any = TokenLoss(model, family)
        naming.vocabulary = vocabulary(module.model.get_output_embeddings())
        inner = optimizer = components.optimizer.build(module.named_parameters(), 1e-3)
        del model
        module, optimizer = engine.prepare(module, optimizer)
        inner = getattr(engine._optimizer, "optimizer", inner)
        naming.weights = {local(p.data).untyped_storage()._cdata for p in engine.model.parameters()}
        own(ledger, engine, inner)
        for _ in range(2):
            one_step(engine, module, batch, accumulation)
        gc.collect()
        own(ledger, engine, inner)
        first, before = len(ledger.events), ledger.held()
        for _ in range(4):
            one_step(engine, module, batch, accumulation, lambda: own_gradients(ledger, engine))
        own(ledger, engine, inner)
        _, parts = ledger.peak(first)
    found: dict[str, Any] = {"parts": dict(parts), "rise": sum(parts.values()) - sum(before.values())}
    found["profiler"] = profiled(partial(one_step, engine, module, batch, accumulation))
    found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del module, optimizer, inner
    engine.close()
    gc.collect()
    return found


def profiled(step: Any) -> int:
    """Returns how far two steps raise what torch's CPU allocator has handed out, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
        step()
    now = most = 0
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def all_measured(cells: dict[str, tuple[list[str], Rows]]) -> dict[str, dict[str, Any]]:
    """Returns `measured` of each cell on this rank, or the error in words."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name, (overrides, rows) in cells.items():
        try:
            found[name] = measured(overrides, rows)
        except Exception:
            found[name] = {"error": traceback.format_exc()[-1500:]}
    return found
