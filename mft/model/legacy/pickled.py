"""Pickled weights, as many older releases come, written once as safetensors: models are loaded from nothing
else."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

from mft.errors import UserError, nearest
from mft.files.checksums import follow_umask
from mft.model.model_folder import read_config
from mft.model.quantised_checkpoint import weight_format
from mft.model.quantised_tensors import check_tensors
from mft.model.safetensors_header import Tensor
from mft.model.safetensors_header import tensors as header


def convert(folder: Path) -> list[Path]:
    """Returns the safetensors files, and their index, made of the pytorch_model*.bin files of a folder.

    Raises UserError when there are none, when safetensors are there already, for a file that holds more than
    tensors, and for quantised weights that could not be read afterwards.
    """
    from safetensors.torch import save_file

    if not folder.is_dir():
        siblings = [str(p) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"{folder} is not a folder{nearest(folder, siblings)}")
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} has no pytorch_model*.bin file")
    if there := sorted(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has {there[0].name} already; models are loaded from it")
    stored = weight_format(str(folder), read_config(folder), None)
    where: dict[str, str] = {}
    headers: dict[str, Tensor] = {}
    size = 0
    for file in files:
        weights = read(file)
        target = file.with_name(file.name.replace("pytorch_model", "model")).with_suffix(".safetensors")
        # clone: tied weights share memory in a pickle, which safetensors does not have
        tensors = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        save_file(tensors, target.with_suffix(".tmp"), metadata={"format": "pt"})
        follow_umask([target.with_suffix(".tmp")])
        where |= dict.fromkeys(tensors, target.name)
        headers |= header(target.with_suffix(".tmp"))
        size += sum(tensor.nbytes for tensor in tensors.values())
    try:
        check_tensors(str(folder), stored.method, stored.settings, headers, folder)
    except UserError:
        for name in set(where.values()):
            (folder / name).with_suffix(".tmp").unlink()
        raise
    made = [folder / name for name in sorted(set(where.values()))]
    for target in made:  # only now, so that an interrupted call leaves nothing that would be loaded
        target.with_suffix(".tmp").rename(target)
    if len(made) == 1 and made[0].name == "model.safetensors":
        return made
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n")
    return [*made, index]


def read(file: Path) -> dict[str, Any]:
    """Returns the tensors of a pickled file, by name."""
    import torch

    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file} cannot be read as tensors alone, so it is not read at all: {reason}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise UserError(f"{file} does not map names to tensors, so it is not a model's weights")
    return weights
