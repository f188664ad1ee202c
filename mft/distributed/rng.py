"""The random states of this rank: seeded, saved, and restored without executing anything a file contains."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def save(path: Path) -> None:
    """Writes the random states of python, numpy, torch and this rank's GPU."""
    import torch

    torch.save(_states(), path)


def load(path: Path) -> None:
    """Restores what `save` wrote; a GPU state is left out where there is no GPU."""
    import torch

    _restore(torch.load(path, map_location="cpu", weights_only=True))


@contextmanager
def kept() -> Iterator[None]:
    """Context that leaves the random states as they were, whatever is drawn in it."""
    states = _states()
    try:
        yield
    finally:
        _restore(states)


def _states() -> dict[str, Any]:
    """Returns lists and numbers: what torch.load takes with weights_only=True."""
    import numpy
    import torch

    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, numpy.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _restore(states: dict[str, Any]) -> None:
    import numpy
    import torch

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch on every device."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
