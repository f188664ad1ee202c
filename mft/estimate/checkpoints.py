"""What checkpoints need of the disk."""

from __future__ import annotations

from pathlib import Path

from mft.estimate.memory import Sizes, size_words
from mft.files.disk import free_bytes, nearest_folder


def size(sizes: Sizes, states: float, gathers: bool) -> float:
    """Returns the size of a checkpoint: the trained weights as peft or transformers load them, and the state
    that a run resumes from. gathers: whether it holds the former."""
    return sizes.trained * ((4 if gathers else 0) + 4 + states)


def words(newest: float, older: float, kept: int | None, written: int, folder: Path) -> str:
    """Returns the sizes of checkpoints beside the free space of the disk.

    newest, older: bytes of the newest one and of each other one; kept: checkpoints beside the best one,
    None = all; written: those that the run writes; folder: where they go, which need not exist yet.
    """
    there = nearest_folder(folder)
    free = free_bytes(there)
    most = written if kept is None else min(written, kept + 1)
    total = newest + older * (most - 1)
    each = (
        f"{size_words(newest)} each"
        if older == newest
        else f"{size_words(newest)}, older {size_words(older)}"
    )
    shown = f"{each}, {most:,} kept at most: {size_words(total)}"
    few = ", which is too little: set train.keep, or a larger train.save_every" if total > free else ""
    return f"{shown}; {size_words(free)} are free in {there}{few}"
