"""What a rank of a case needs of memory, with as few layers recomputed and as many rows in a micro-batch as its
device has room for, where the settings are auto."""

from __future__ import annotations

import copy
from dataclasses import replace

from mft.estimate.memory import CONTEXT, USABLE
from mft.estimate.rank import RankMemory, rank_memory
from mft.estimate.room import OF_A_HOST
from mft.model.checkpointing import EVERY, layers_between
from mft.plan.case import Case

PROCESS = 0.7 * 2**30
"""Bytes of a process on a CPU that has imported what a run imports."""


def room(of: Case) -> float:
    """Returns the bytes of its device that are counted on."""
    if of.device.kind == "cpu":
        return max(0.0, USABLE * of.memory - PROCESS)
    return max(0.0, USABLE * of.memory - CONTEXT)


def peak(of: Case, memory: RankMemory) -> float:
    """Returns the most that a rank takes of its device; that of a CPU holds what is offloaded and gathered,
    too."""
    if of.device.kind == "cpu":
        held = sum(memory.host.values())
        return held + max(memory.loading, memory.step, memory.saving + memory.host_saving)
    return memory.peak


def on_host(of: Case, memory: RankMemory) -> float:
    """Returns what the ranks of the first machine take of its memory beside their devices: what is offloaded,
    what is gathered for a checkpoint, and the processes; 0 of a CPU, whose memory that is."""
    if of.device.kind == "cpu":
        return 0.0
    return of.together * (sum(memory.host.values()) + PROCESS) + memory.host_saving


def needed(of: Case, smallest: bool = False) -> RankMemory:
    """Returns what a rank needs, of one row where the micro-batch is to be found.

    smallest: with all layers recomputed where model.gradient_checkpointing is auto.
    """
    if not chooses(of):
        return _with(of, None)
    usable = room(of)
    if not smallest and peak(of, memory := _with(of, EVERY[0])) <= usable:
        return memory
    least = _with(of, EVERY[-1])
    if smallest or peak(of, least) > usable:  # nor do fewer fit
        return least
    return next((found for every in EVERY[1:-1] if peak(of, found := _with(of, every)) <= usable), least)


def largest(of: Case) -> tuple[Case, RankMemory]:
    """Returns a case whose micro-batch is to be found with the largest that fits, and what a rank needs then.

    As in a run, the recomputed layers are those for one row.
    """
    memory = needed(of)
    every = memory.every if chooses(of) else None
    found = with_rows(of, 1), memory
    rows, limit = of.sizes.accumulation, OF_A_HOST * of.memory if of.device.kind == "cpu" else room(of)
    sizes = [size for size in range(2, rows + 1) if rows % size == 0] if peak(of, memory) <= limit else []
    while sizes:  # the larger half of them, or the smaller one
        middle = len(sizes) // 2
        more = with_rows(of, sizes[middle])
        if peak(more, memory := _with(more, every)) <= limit:
            found, sizes = (more, memory), sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return found


def with_rows(of: Case, rows: int) -> Case:
    """Returns a case with so many rows in a micro-batch."""
    cfg = copy.deepcopy(of.cfg)
    cfg.train.per_device_batch_size = rows
    return replace(of, cfg=cfg)


def chooses(of: Case) -> bool:
    """Whether the number of layers that are recomputed is chosen by memory."""
    return of.device.kind == "cuda" and layers_between(of.parts.model.gradient_checkpointing) is None


def _with(of: Case, every: int | None) -> RankMemory:
    return rank_memory(of.cfg, of.world, of.device.kind, automatic=every, skeletons=of.skeletons)
