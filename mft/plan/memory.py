"""What a rank of a case needs of memory, with as few layers recomputed and as many rows in a micro-batch as its
device has room for, where the settings are auto."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from mft.estimate.memory import CONTEXT, USABLE
from mft.estimate.rank import RankMemory, rank_memory
from mft.estimate.room import OF_A_HOST
from mft.model.checkpointing import EVERY, layers_between
from mft.plan.case import Case

PROCESS = 0.7 * 2**30
"""Bytes of a process on a CPU that has imported what a run imports."""

_known: dict[str, RankMemory] = {}
"""By all that decides it: several devices are asked for the same estimate."""


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


def needed(of: Case, smallest: bool = False) -> tuple[Case, RankMemory]:
    """Returns what a rank needs, and the case with the micro-batch that this is of.

    smallest: with all layers recomputed and one row where these settings are auto.
    """
    fewest = _with_rows(of, 1) if not of.sizes.found else of
    every, memory = _with_layers(fewest, smallest)
    if smallest or of.sizes.found or peak(fewest, memory) > (limit := _limit(of)):
        return fewest, memory
    # as a run has it: the layers are chosen for one row, then the rows are added
    rows = fewest.sizes.accumulation
    sizes, found = [size for size in range(2, rows + 1) if rows % size == 0], (fewest, memory)
    while sizes:  # the larger half, or the smaller one
        middle = len(sizes) // 2
        more = _with_rows(of, sizes[middle])
        if peak(more, memory := _with(more, every)) <= limit:
            found, sizes = (more, memory), sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return found


def _limit(of: Case) -> float:
    """Returns what a search for the micro-batch lets a rank take."""
    return OF_A_HOST * of.memory if of.device.kind == "cpu" else room(of)


def _with_rows(of: Case, rows: int) -> Case:
    cfg = copy.deepcopy(of.cfg)
    cfg.train.per_device_batch_size = rows
    return replace(of, cfg=cfg)


def _with_layers(of: Case, smallest: bool) -> tuple[int | None, RankMemory]:
    """Returns of how many layers one is recomputed, None: as the setting has it; and what is needed then."""
    if not chooses(of):
        return None, _with(of, None)
    most, usable = EVERY[-1], room(of)
    if not smallest:
        memory = _with(of, EVERY[0])
        if peak(of, memory) <= usable:
            return EVERY[0], memory
    least = _with(of, most)
    if smallest or peak(of, least) > usable:  # nor with any between them
        return most, least
    for every in EVERY[1:-1]:
        if peak(of, memory := _with(of, every)) <= usable:
            return every, memory
    return most, least


def chooses(of: Case) -> bool:
    """Whether the number of layers that are recomputed is chosen by memory."""
    return of.device.kind == "cuda" and layers_between(of.parts.model.gradient_checkpointing) is None


def _with(of: Case, every: int | None) -> RankMemory:
    cfg: Any = of.cfg
    if every is not None:
        cfg = copy.deepcopy(cfg)
        cfg.model.gradient_checkpointing = every or False
    parts = [OmegaConf.to_yaml(cfg[name]) for name in ("model", "peft", "dist", "optimizer", "train", "data")]
    key = "\0".join([*parts, str(of.world), of.device.kind])
    if key not in _known:
        _known[key] = rank_memory(cfg, of.world, of.device.kind)
    return _known[key]
