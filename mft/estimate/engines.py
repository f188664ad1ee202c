"""What each engine holds of weights, gradients and optimizer, and what it gathers and exchanges in a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from mft.distributed.ddp import Ddp
from mft.distributed.deepspeed import Zero, Zero2, Zero3
from mft.distributed.engine import Backend
from mft.distributed.fsdp import Fsdp

Parts = dict[str, float]
"""Bytes by part."""

REUSE = 1_000_000_000
"""Elements within which ZeRO-3 keeps a gathered weight that is needed again (DeepSpeed's default)."""


@dataclass(frozen=True)
class Unit:
    """A decoder layer, or all that is in none: what is gathered at a time."""

    trained: int
    """Weights that are trained."""
    frozen: int
    """Bytes of those that are neither trained nor packed."""
    packed: int
    """Bytes of quantised ones, with their scales."""
    largest: int = 0
    """Weights in the largest trained matrix."""


@dataclass(frozen=True)
class Model:
    """What engines divide."""

    layers: list[Unit]
    outside: Unit
    """Embedding, head and what else is in no layer."""

    @property
    def units(self) -> list[Unit]:
        return [*self.layers, self.outside]

    @property
    def trained(self) -> int:
        return sum(unit.trained for unit in self.units)

    @property
    def frozen(self) -> int:
        return sum(unit.frozen for unit in self.units)

    @property
    def packed(self) -> int:
        return sum(unit.packed for unit in self.units)

    @property
    def largest(self) -> int:
        return max(unit.largest for unit in self.units)


@dataclass
class Holding:
    """What a rank holds through all of training beside what it computes."""

    device: Parts
    host: Parts = field(default_factory=dict)
    """In the CPU's memory."""


def held(
    model: Model, dist: Backend, world: int, half: bool, states: float, gpu: bool, accumulates: bool
) -> Holding:
    """Returns what a rank holds throughout training, after its first step.

    half: whether the run computes in bf16 or fp16; states: of the optimizer, bytes for a trained weight;
    gpu: whether the device is one; accumulates: whether a step has several micro-batches.
    """
    each, divided, trained = dist.bytes_per_trained_weight(half), dist.divided_parts(), model.trained
    share = {name: 1 / world if name in divided else 1.0 for name in ("weights", "gradients", "optimizer")}
    parts: Parts = {
        "weights": each["weights"] * trained * share["weights"],
        "frozen": model.frozen * share["weights"],
        "packed": model.packed * share["weights"],
        "gradients": each["gradients"] * trained * share["gradients"],
        "optimizer": (each["optimizer"] + states) * trained * share["optimizer"],
    }
    holding = Holding(parts)
    if not divided and not isinstance(dist, Ddp) and not accumulates:
        del parts["gradients"]  # they come and go with the step
    if isinstance(dist, Zero):
        if not half:  # what is updated is a copy also where both are float32
            parts["optimizer"] += 4 * trained / world
        if dist.offload_optimizer:
            holding.host["optimizer"] = parts.pop("optimizer")
            holding.host["gradients"] = 4 * trained / world
    if isinstance(dist, Zero3) and dist.offload_parameters:
        _move(holding, ("weights", "frozen", "packed"))
    if isinstance(dist, Fsdp):
        if accumulates and not dist.reduce_every_micro_batch:
            parts["gradients"] = each["gradients"] * trained
        if dist.offload:
            _move(holding, ("weights", "frozen", "packed", "gradients", "optimizer"))
    return holding


def _move(holding: Holding, names: tuple[str, ...]) -> None:
    for name in names:
        if name in holding.device:
            holding.host[name] = holding.device.pop(name)


def during(model: Model, dist: Backend, world: int, half: bool, phase: str, layer: int) -> Parts:
    """Returns what is gathered and exchanged in a phase of a step (see `mft.estimate.step.moments`)."""
    size = 2 if half else 4
    if isinstance(dist, Zero2):
        bucket = size * min(dist.reduce_bucket_size, model.trained)
        return {"buckets": 2 * bucket} if phase in ("backward", "after") else {}
    if isinstance(dist, Zero3):
        every = size * model.trained + model.frozen + model.packed
        kept = size * min(REUSE, dist.max_live_parameters)
        bucket = size * min(dist.reduce_bucket_size, model.trained)
        return {"gathers": min(every, kept), "buckets": 2 * bucket}
    if isinstance(dist, Fsdp):
        outside, units = _whole(model.outside, size), model.layers
        if layer < 0:
            return {"gathers": outside}
        here = _whole(units[layer], size)
        step = 1 if phase == "forward" else -1
        following = _whole(units[layer + step], size) if 0 <= layer + step < len(units) else 0.0
        sent = 4 * units[layer].trained if phase == "backward" else 0.0
        return {"gathers": outside + here + following, "buckets": sent}
    return {}


def _whole(unit: Unit, size: int) -> float:
    return size * unit.trained + unit.frozen + unit.packed


def loading(model: Model, dist: Backend, world: int, half: bool, holding: Holding) -> float:
    """Returns the device's peak until the engine is prepared: the model as it is read, float32 where it is
    trained, and what the engine makes of it."""
    whole = 4.0 * model.trained + model.frozen + model.packed
    if isinstance(dist, Zero2):  # a flat copy of what is trained, and the part that is updated
        return (
            whole + dist.bytes_per_trained_weight(half)["weights"] * model.trained + 4 * model.trained / world
        )
    if isinstance(dist, Zero3 | Fsdp):  # a unit at a time is whole
        largest = max(4.0 * unit.trained + unit.frozen + unit.packed for unit in model.units)
        return whole / world + largest
    return whole


def saving(model: Model, dist: Backend, holding: Holding, half: bool) -> tuple[float, float]:
    """Returns the peaks while a checkpoint is written, of the device and of the first rank's host: an engine
    that divides gathers one weight at a time there."""
    here = sum(holding.device.values())
    if not dist.divided_parts():
        return here, 0.0
    gathered = model.frozen if not model.packed and not _adapts(model) else 0.0
    return here + 2 * 4.0 * model.largest, 4.0 * model.trained + gathered


def _adapts(model: Model) -> bool:
    return model.frozen + model.packed > 0
