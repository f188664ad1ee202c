"""What a rank of a case needs of memory, with as few layers recomputed as its device has room for."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import OmegaConf

from mft.estimate.memory import CONTEXT, USABLE
from mft.estimate.rank import RankMemory, rank_memory
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


def needed(of: Case, smallest: bool = False) -> RankMemory:
    """Returns what a rank needs; smallest: with all layers recomputed where the setting is auto."""
    found = None
    for every in EVERY[-1:] if smallest and chooses(of) else _choices(of):
        found = _with(of, every)
        if found.peak <= room(of):
            break
    assert found is not None
    return found


def chooses(of: Case) -> bool:
    """Whether the number of layers that are recomputed is chosen by memory."""
    return of.device.kind == "cuda" and layers_between(of.parts.model.gradient_checkpointing) is None


def _choices(of: Case) -> Sequence[int | None]:
    """Returns of how many layers one may be recomputed, the fastest first; None: as the setting has it."""
    return EVERY if chooses(of) else (None,)


def _with(of: Case, every: int | None) -> RankMemory:
    names = ("model", "peft", "dist", "optimizer", "train", "data")
    parts = [OmegaConf.to_yaml(of.cfg[name]) for name in names]
    key = "\0".join([*parts, str(every), str(of.world), of.device.kind])
    if key not in _known:
        _known[key] = rank_memory(of.cfg, of.world, of.device.kind, automatic=every)
    return _known[key]
