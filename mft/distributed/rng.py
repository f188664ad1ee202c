"""The random states of this rank: seeded, saved, and restored without executing anything a file contains."""

from __future__ import annotations

import random
from pathlib import Path


def save(path: Path) -> None:
    """Writes the random states of python, numpy, torch and this rank's GPU."""
    import numpy
    import torch

    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    # lists and numbers: what torch.load takes with weights_only=True
    torch.save(
        {
            "python": [version, list(internal), gauss],
            "numpy": [kind, numpy.asarray(keys).tolist(), position, has_gauss, cached],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        },
        path,
    )


def load(path: Path) -> None:
    """Restores what `save` wrote; a GPU state is left out where there is no GPU."""
    import numpy
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch on every device."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
