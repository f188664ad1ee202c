"""Pickled weights, as in many older releases, written once as safetensors: nothing else is loaded."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from mft.errors import UserError, nearest_sibling
from mft.files.checksums import follow_umask
from mft.model.legacy.convert import write_index
from mft.model.model_folder import read_config
from mft.model.quantised_checkpoint import weight_format
from mft.model.quantised_tensors import check_tensors
from mft.model.safetensors_header import Tensor, tensors

if TYPE_CHECKING:
    import torch


def convert(folder: Path) -> list[Path]:
    """Returns the safetensors files, and their index, made of the pytorch_model*.bin files of a folder.

    Raises UserError when there are none, when safetensors are there already, for a file that holds more than
    tensors, and for quantised weights that could not be read afterwards.
    """
    from safetensors.torch import save_file

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder{nearest_sibling(folder)}")
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise UserError(f"{folder} has no pytorch_model*.bin file")
    if present := sorted(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has {present[0].name} already; models are loaded from it")
    stored = weight_format(str(folder), read_config(folder), None)
    file_of: dict[str, str] = {}
    headers: dict[str, Tensor] = {}
    size = 0
    # Under other names until all are complete: an interrupted call leaves nothing that would be loaded.
    temporary: dict[Path, Path] = {}
    try:
        for file in pickles:
            target = file.with_name(file.name.replace("pytorch_model", "model")).with_suffix(".safetensors")
            # clone: tied weights share memory in a pickle, which safetensors does not have
            weights = {name: tensor.contiguous().clone() for name, tensor in read(file).items()}
            temporary[target] = target.with_suffix(".tmp")
            save_file(weights, temporary[target], metadata={"format": "pt"})
            file_of |= dict.fromkeys(weights, target.name)
            headers |= tensors(temporary[target])
            size += sum(tensor.nbytes for tensor in weights.values())
        check_tensors(str(folder), stored.method, stored.settings, headers, folder)
    except UserError:
        for path in temporary.values():
            path.unlink()
        raise
    follow_umask(temporary.values())
    for target, path in temporary.items():
        path.rename(target)
    return [*temporary, *write_index(folder, file_of, size)]


def read(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a pickled file, by name."""
    import torch

    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # what is cut or no pickle raises a dozen classes, from EOFError to struct.error
        reason = str(error).partition("\n")[0] or type(error).__name__
        unread = "cannot be read as tensors alone, so it is not read at all"
        raise UserError(f"{file} {unread}: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise UserError(f"{file} does not map names to tensors, so it is not a model's weights")
    return weights
