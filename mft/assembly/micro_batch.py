"""`train.per_device_batch_size=auto`: the largest micro-batch that fits on the devices of a run.

Micro-batches of the longest rows go forward and backward on the prepared model, as in a step that updates
nothing. From the peaks of the sizes so far each rank predicts the next one, and all do what the one with the
least room can. Sizes divide a rank's rows of a step, so that the step, and the experiment, stays what it is.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from mft.assembly.start import Run
from mft.data.loader import BatchLoader
from mft.distributed import rng
from mft.errors import UserError
from mft.estimate import memory
from mft.estimate.memory import size_words
from mft.estimate.room import Gpu, Host, Room, ran_out
from mft.files.json_file import read_json, write_json
from mft.model.peft.summary import total_of
from mft.run_folder import MICRO_BATCH
from mft.training.validate import forward

if TYPE_CHECKING:
    import torch

    from mft.assembly.model import Model

SETTING = "train.per_device_batch_size=auto"

GROWTH = 4
"""Times the largest size that fits, that the next one is at most: a line through two small sizes may be off
for a much larger one."""


class Found(NamedTuple):
    """The largest size that fits, and the memory of the rank that has the least room for it, in bytes."""

    rows: int
    peak: float
    limit: float
    whole: float
    """Of its device; what does not fit there has a peak above."""


def optimizer_to_come(r: Run, model: Model) -> float:
    """Returns the bytes that a rank's optimizer will take on the device from its first step on.

    model: before an engine divides it.
    """
    dist: Any = r.parts.dist
    elsewhere = getattr(dist, "offload_optimizer", False) or getattr(dist, "offload", False)
    if elsewhere and r.engine.device.type == "cuda":
        return 0.0
    trained = total_of(r.parts.peft.audit(model), "trainable")
    ranks = r.engine.world if "optimizer" in dist.divided_parts() else 1
    return memory.optimizer_bytes(r.parts.optimizer, r.parts.base_lr) * trained / ranks


def find(r: Run, loader: BatchLoader, module: torch.nn.Module, coming: float) -> None:
    """Gives the loader the largest micro-batch that fits on every rank, and says what was found.

    What a run has found on the same devices it takes again when it is resumed. module: prepared; coming: see
    `optimizer_to_come`. All ranks call it. Weights, gradients and random states are afterwards as they were.
    Raises UserError where not even one row fits.
    """
    engine, rows = r.engine, loader.sizes.accumulation
    room = _room(r)
    devices, recorded = engine.gather(room.device), engine.gather(read_json(r.folder / MICRO_BATCH))[0]
    size, earlier = int(recorded.number("per_device_batch_size") or 0), recorded.texts("devices")
    if size and earlier == devices and rows % size == 0:
        loader.sizes = loader.sizes.with_rows(size)
        r.progress.show(f"{SETTING}: {_words(loader)}, as this run found on these devices before")
        return
    begun = time.monotonic()
    training, may_fail = module.training, engine.device.type == "cuda" and not _divided(r)
    module.train()
    with rng.kept():
        trial = partial(_tried, r, loader, module, room, coming)
        found = search(rows, trial, room, engine.gather, may_fail)
    module.train(training)
    room.reset()  # the run's own peaks are not these
    if found.peak > found.whole:
        raise _too_large(r, f"{size_words(found.peak)} at the peak, of {size_words(found.whole)}")
    loader.sizes = loader.sizes.with_rows(found.rows)
    if engine.is_main:
        values = {"per_device_batch_size": found.rows, "devices": devices}
        write_json(r.folder / MICRO_BATCH, values | {"peak_bytes": found.peak, "limit_bytes": found.limit})
    states = f", with {size_words(coming)} for the optimizer's states" if coming else ""
    above = ", which it exceeds: memory may run out" if found.peak > found.limit else ""
    anew = f"; searched anew, since this run found {size} rows on {_each(earlier)}" if size else ""
    seconds = f"; searched for {time.monotonic() - begun:.1f} s"
    r.progress.show(
        f"{SETTING}: {_words(loader)}; {size_words(found.peak)} at the peak{states}, limit "
        f"{size_words(found.limit)} ({room.words}){above}{anew}{seconds}"
    )


def search(
    rows: int,
    trial: Callable[[int], tuple[float, float]],
    room: Room,
    gather: Callable[[Any], list[Any]],
    may_fail: bool = False,
) -> Found:
    """Returns the largest divisor of `rows` that fits into the room of every rank, or 1.

    trial: size → bytes that this rank holds before the micro-batch, and at its peak, inf where memory ran
    out; gather: this rank's value → those of all; may_fail: whether a trial may run out of memory. Where it
    may not, a size is tried only if it is predicted to fit.
    """
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    measured: dict[int, float] = {}
    best, above, size = None, rows + 1, 1
    while size:
        held, measured[size] = trial(size)
        measured.setdefault(0, held)
        of_ranks = gather((measured[size], room.limit, room.whole))
        peak, limit, whole = max(of_ranks, key=lambda of: of[0] - of[1])
        if best is None or peak <= limit:
            best = Found(size, peak, limit, whole)
        if peak > limit:
            above = size
        larger = [other for other in sizes if best.rows < other < above]
        near = [other for other in larger if other <= GROWTH * best.rows] or larger[:1]
        fitting = [other for other in near if _predicted(measured, other) <= room.limit]
        if may_fail and best.rows == 1 and not fitting:
            fitting = near[:1]  # what one row needs is not all proportional to rows
        size = min(gather(max(fitting, default=0)))
    assert best is not None
    return best


def _predicted(measured: dict[int, float], size: int) -> float:
    """Returns the peak of a size by the line through the two largest that were measured."""
    one, two = sorted(size for size, peak in measured.items() if math.isfinite(peak))[-2:]
    slope = max(0.0, measured[two] - measured[one]) / (two - one)
    return measured[two] + slope * (size - two)


def _tried(
    r: Run, loader: BatchLoader, module: torch.nn.Module, room: Room, coming: float, size: int
) -> tuple[float, float]:
    """Returns what this rank holds before a micro-batch of `size` rows, with the gradients of an earlier one
    where a step has several, and the peak in it; both with what the optimizer will hold."""
    engine, held = r.engine, [0.0]

    def share(rows: int) -> torch.Tensor:
        # of any loss: what the modes add to it is small beside the model's activations
        held.append(room.used())
        nll_BT, router = forward(module, loader.largest(rows).to(engine.device))
        return nll_BT.mean() + router

    several = loader.sizes.accumulation > size
    room.reset()
    try:
        engine.try_out([*([partial(share, 1)] if several else []), partial(share, size)])
        peak = room.peak() + coming
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        if _divided(r):  # the other ranks wait in a collective for this one, and end with it
            raise _too_large(r, " ".join(str(error).split())[:200], size) from None
        peak = math.inf
    if peak == math.inf:  # here, where no traceback keeps activations alive any more
        engine.try_out([])
        gc.collect()
    return held[-1] + coming, peak


def _divided(r: Run) -> bool:
    """Whether a rank cannot go through a micro-batch without the others."""
    return r.engine.divided and r.engine.world > 1


def _room(r: Run) -> Room:
    if r.engine.device.type == "cuda":
        return Gpu.of(r.engine.device)
    return Host.of(int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * r.cfg.launch.jobs)


def _words(loader: BatchLoader) -> str:
    rows, count = loader.sizes.per_device, loader.sizes.accumulation
    return f"{rows} row{'s' * (rows > 1)}, {count} micro-batch{'es' * (count > 1)} of a step on each rank"


def _each(devices: list[str]) -> str:
    return " and ".join(f"{devices.count(name)} x {name}" for name in sorted(set(devices)))


def _too_large(r: Run, what: str, size: int = 1) -> UserError:
    tokens = f"of data.seq_length={r.data_settings.seq_length} tokens"
    failed = f"not even one row {tokens} fits"
    cure = "Lower data.seq_length, or set model.gradient_checkpointing=true, peft=qlora or dist=zero3"
    if size > 1:
        failed = f"{size} rows {tokens} did not fit, against the prediction"
        cure += f", or train.per_device_batch_size to a number below {size}"
    return UserError(f"{SETTING}: {failed}: {what}. {cure}.")
