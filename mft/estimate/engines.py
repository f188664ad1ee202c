"""What each engine holds of weights, gradients and optimizer, and what it gathers and exchanges in a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from mft.distributed.ddp import Ddp
from mft.distributed.deepspeed import Zero, Zero2, Zero3
from mft.distributed.engine import Backend
from mft.distributed.fsdp import Fsdp
from mft.estimate.sizes import Model, Unit

Parts = dict[str, float]
"""Bytes by part."""

REUSE = 1_000_000_000
"""Elements within which ZeRO-3 keeps a gathered weight that is needed again (DeepSpeed's default)."""


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
        if isinstance(dist, Zero2) and not accumulates:
            del parts["gradients"]  # made when buckets are exchanged, see `during`
        if isinstance(dist, Zero3):
            if world > 1:  # else they lie beside nothing: no rank gathers
                parts["weights"] += model.small
            parts["buckets"] = each["gradients"] * min(dist.reduce_bucket_size, trained)
        if dist.offload_optimizer:
            holding.host["optimizer"] = parts.pop("optimizer")
            as_sent = parts.pop("gradients", 0.0)
            holding.host["gradients"] = 4 * trained / world + (as_sent if isinstance(dist, Zero3) else 0.0)
        if isinstance(dist, Zero2) and dist.offload_optimizer:  # what comes back, and a gradient on its way
            holding.host["weights"] = each["weights"] * trained / world
            holding.host["buckets"] = parts["buckets"] = float(each["gradients"] * model.largest)
    if isinstance(dist, Zero3) and dist.offload_parameters:
        _move(holding, ("weights", "frozen", "packed"))
    if isinstance(dist, Fsdp):
        del parts["gradients"]  # see `during`
        if accumulates and dist.reduce_every_micro_batch and not dist.offload:
            parts["gradients"] = 4.0 * trained / world
        if dist.offload:
            holding.host["gradients"] = 4.0 * trained / world
            _move(holding, ("weights", "frozen", "packed", "optimizer"))
    return holding


def _move(holding: Holding, names: tuple[str, ...]) -> None:
    for name in names:
        if name in holding.device:
            holding.host[name] = holding.device.pop(name)


def during(
    model: Model, dist: Backend, world: int, half: bool, phase: str, layer: int, accumulates: bool, gpu: bool
) -> Parts:
    """Returns what is gathered and exchanged in a phase of a step (see `mft.estimate.step.moments`)."""
    if isinstance(dist, Zero2):
        parts = _during_zero2(model, dist, world, half, phase, gpu)
        kept = dist.stage == 1 or not dist.offload_optimizer
        if kept and not accumulates and model.trained > dist.reduce_bucket_size:
            # a rank's own part, or, as ZeRO-1 adds them up in place, all of them
            arrived = _arrived(model, half, phase, layer) / (1 if dist.stage == 1 else world)
            parts["gradients"] = parts.get("gradients", 0.0) + arrived
        return parts
    if isinstance(dist, Zero3):
        return _during_zero3(model, dist, world, half, phase, layer)
    if isinstance(dist, Fsdp):
        return _during_fsdp(model, dist, world, half, phase, layer, accumulates)
    if isinstance(dist, Ddp) and accumulates:
        return _during_ddp(model, dist, half, phase, layer)
    return {}


def _during_ddp(model: Model, dist: Ddp, half: bool, phase: str, layer: int) -> Parts:
    """Sums of earlier micro-batches lie beside the buckets, which they are moved to in the last backward
    pass."""
    if phase in ("exchange", "update"):
        return {}
    moved = _above(model, layer) if phase in ("backward", "after") else 0
    return {"gradients": float(dist.bytes_per_trained_weight(half)["gradients"] * (model.trained - moved))}


def _during_zero2(model: Model, dist: Zero2, world: int, half: bool, phase: str, gpu: bool) -> Parts:
    """A bucket is filled, and copied when it is exchanged; the update has the gradients flat and in
    float32."""
    size = 2 if half else 4
    bucket = size * min(dist.reduce_bucket_size, model.trained)
    one = model.trained <= dist.reduce_bucket_size
    own = size * model.trained / world
    if phase == "update":
        return {"activations": own + (4 * model.trained / world if half else 0), "gradients": own * one}
    if phase not in ("backward", "after", "exchange"):
        return {}
    filled = bucket * (2 if dist.overlap_comm and gpu and not one else 1)
    exchanged = phase == "exchange" or not one
    # A GPU frees the copy later than a rank's own gradients are made of it; gloo may, too, at times.
    return {"buckets": filled + bucket * exchanged, "gradients": own * (one and exchanged and gpu)}


def _arrived(model: Model, half: bool, phase: str, layer: int) -> float:
    """Returns the bytes of whole gradients that ZeRO-1 or 2 has exchanged bucket by bucket."""
    if phase not in ("backward", "after", "exchange", "update"):
        return 0.0
    arrived = model.outside.trained + _above(model, layer) if phase == "backward" else model.trained
    return float((2 if half else 4) * arrived)


def _above(model: Model, layer: int) -> int:
    """Returns the trained weights of the layers above one, -1 = of all: their backward pass is done."""
    return sum(unit.trained for unit in model.layers[layer + 1 :])


def _during_zero3(model: Model, dist: Zero3, world: int, half: bool, phase: str, layer: int) -> Parts:
    """Weights stay gathered while they are needed again soon; what is gathered next comes in one tensor."""
    size = 2 if half else 4
    bucket = size * min(dist.reduce_bucket_size, model.trained)
    if phase == "update":
        return {"activations": 4 * min(REUSE, model.trained) / world}
    limit = float(size * REUSE)
    layers = [_whole(unit, size) - unit.small for unit in model.layers]
    outside = _whole(model.outside, size) - model.outside.small
    ahead = size * min(dist.prefetch_bucket_size, dist.max_live_parameters)
    if phase == "before" or (phase == "forward" and layer == 0):
        first = min(sum(layers), max(ahead, max(layers)))
        return {"gathers": (outside + 2.0 * first) * (world > 1)}
    needed = layers[: layer + 1] if phase == "backward" else [] if phase in ("after", "exchange") else layers
    several = model.trained > dist.reduce_bucket_size
    exchanged = phase == "exchange" or (several and phase == "backward")
    outside -= model.looked_up
    gathers = (outside + min(sum(needed), limit)) * (world > 1)
    return {"gathers": gathers, "buckets": 2.0 * bucket * exchanged}


def _during_fsdp(
    model: Model, dist: Fsdp, world: int, half: bool, phase: str, layer: int, accumulates: bool
) -> Parts:
    """What is in no layer is whole from the beginning to the end, a layer while it computes, and the next one
    is on its way; gradients of a layer are sent in float32. Without `reshard` a layer is whole from its forward
    to its backward pass."""
    size = 2 if half else 4
    units = model.layers
    last, whole = len(units) - 1, [_whole(unit, size) for unit in model.layers]
    gathers, sent, arrived = _whole(model.outside, size), 0.0, 0
    if phase == "forward":
        gathers += sum(whole[0 if not dist.reshard else layer : layer + 2])
    elif phase in ("head", "turn"):
        gathers += sum(whole[0 if not dist.reshard else last :])
    elif phase == "backward":
        gathers += sum(whole[0 if not dist.reshard else max(layer - 1, 0) : layer + 1])
        arrived = _above(model, layer)
        sent = 4.0 * units[layer + 1].trained if layer < last else 0.0
    elif phase == "after":
        arrived, sent = _above(model, -1), 4.0 * units[0].trained
    elif phase in ("exchange", "update"):
        gathers, arrived = 0.0, model.trained
    work = 0.0
    if phase == "exchange":
        # what is in no layer comes last: its gradients once as they are sent, and the sum
        sent, work = 2 * 4.0 * model.outside.trained, float(size * model.outside.largest)
    summed = accumulates and dist.reduce_every_micro_batch  # see `held`
    gradients = 0.0 if summed or dist.offload else 4.0 * arrived / world
    if accumulates and not summed:  # those of earlier micro-batches, whole until they are sent
        gradients += 4.0 * (model.trained - arrived)
    return {"gathers": gathers, "buckets": sent, "activations": work, "gradients": gradients}


def _whole(unit: Unit, size: int) -> float:
    return size * unit.trained + unit.frozen + unit.packed


def loading(model: Model, dist: Backend, world: int, half: bool, holding: Holding) -> float:
    """Returns the device's peak until the engine is prepared: the model as it is read, float32 where it is
    trained, and what the engine makes of it."""
    whole = 4.0 * model.trained + model.frozen + model.packed
    if isinstance(dist, Zero2):  # a flat copy of what is trained, and the part that is updated
        updated = 0.0 if dist.offload_optimizer else 4 * model.trained / world
        return whole + dist.bytes_per_trained_weight(half)["weights"] * model.trained + updated
    if isinstance(dist, Zero3 | Fsdp):  # a unit at a time is whole, and its parts go where they are held
        largest = max(4.0 * unit.trained + unit.frozen + unit.packed for unit in model.units)
        return largest + (0.0 if "weights" in holding.host else whole / world)
    return whole


def saving(model: Model, dist: Backend, holding: Holding) -> tuple[float, float]:
    """Returns the peaks while a checkpoint is written, of the device and of the first rank's host: an engine
    that divides gathers one weight at a time there."""
    here = sum(holding.device.values())
    if not dist.divided_parts():
        return here, 0.0
    return here + 2 * 4.0 * model.largest, 4.0 * model.trained
