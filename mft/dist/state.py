"""Files of an exact resume that do not depend on the backend: random states, trained parameters, plain torch state."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError

if TYPE_CHECKING:
    import torch


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes a dict of tensors and plain values."""
    import torch

    torch.save(state, path)


def read(path: Path) -> dict[str, Any]:
    """Reads what `write` wrote. Nothing in the file is executed; tensors come to the CPU."""
    import torch

    if not path.exists():
        raise UserError(f"{path.parent} is not a complete resume state: {path.name} is missing")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_parameters(module: torch.nn.Module, path: Path) -> None:
    """Writes the trained parameters by name (a tied parameter once) as safetensors."""
    from safetensors.torch import save_file

    save_file({name: p.detach().contiguous() for name, p in module.named_parameters() if p.requires_grad}, path)


def load_parameters(module: torch.nn.Module, path: Path) -> None:
    """Copies saved parameters into the module's trained parameters; names and shapes must match exactly."""
    import torch
    from safetensors import safe_open

    if not path.exists():
        raise UserError(f"{path.parent} is not a complete resume state: {path.name} is missing")
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with safe_open(path, framework="pt") as file, torch.no_grad():
        saved = set(file.keys())
        if saved != set(trained):
            only = sorted(saved ^ set(trained))
            raise UserError(
                f"{path} does not fit the model: {len(only)} parameters are only in one of them, e.g. {only[0]}"
            )
        for name, parameter in trained.items():
            value = file.get_tensor(name)
            if value.shape != parameter.shape:
                raise UserError(
                    f"{path} does not fit the model: {name} is {list(value.shape)} there, {list(parameter.shape)} here"
                )
            parameter.copy_(value)


def save_rng(path: Path) -> None:
    """Writes the random states of python, numpy, torch and this rank's GPU."""
    import numpy
    import torch

    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    write(
        path,
        {
            "python": [version, list(internal), gauss],
            "numpy": [kind, numpy.asarray(keys).tolist(), position, has_gauss, cached],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        },
    )


def load_rng(path: Path) -> None:
    """Restores what `save_rng` wrote; a GPU state is left out where there is no GPU."""
    import numpy
    import torch

    state = read(path)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
