"""Reads the headers of a model folder's safetensors files: which tensors there are, and whether the files are
complete.

Reads no weights, so that a folder of any size is checked in milliseconds. `safe_open` of safetensors would
name neither the size that is expected nor a pointer of git-lfs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mft.errors import UserError, nearest

INDEX = "model.safetensors.index.json"
Shape = tuple[int, ...]
FLOATS = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the types of plain weights."""


class Tensor(NamedTuple):
    """A tensor by the header of its file; dtype: as safetensors calls it, e.g. BF16 or F8_E4M3."""

    dtype: str
    shape: Shape


Stored = Mapping[str, tuple[str, Tensor]]
"""Name of a tensor → the name of its file, and its header."""


def check_files(folder: Path) -> None:
    """Raises UserError for a file that is not complete safetensors, and as `weight_files`."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors(file)
    weight_files(folder)


def stored_tensors(folder: Path) -> Stored:
    """Returns every tensor that a model of this folder is loaded from."""
    return {n: (file.name, tensor) for file in weight_files(folder) for n, tensor in tensors(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that a model is loaded from, [] without any safetensors.

    Raises UserError for shards without an index, and for one that is missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    single, index = folder / "model.safetensors", folder / INDEX
    if not files or single.is_file():  # which is read before any index
        return [single] if files else []
    if not index.is_file():
        raise UserError(f"{folder} has {files[0].name}, but neither model.safetensors nor {INDEX}")
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} must be a JSON object with a weight_map: {error}") from error
    there = {file.name for file in files}
    if absent := sorted(named - there):
        raise UserError(
            f"{index} names {absent[0]}, which is not in the folder{nearest(absent[0], there - named)}; "
            f"{len(absent)} of {len(named)} files are missing"
        )
    return [file for file in files if file.name in named]


def tensors(file: Path) -> dict[str, Tensor]:
    """Returns every tensor of a safetensors file, by name; UserError for one that is cut short or is another
    format."""
    stat = file.stat()
    return _header(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=512)  # several checks ask; size and time of change tell an edited file
def _header(file: Path, size: int, changed: int) -> dict[str, Tensor]:
    # The format: 8 bytes with the header's length, the header in JSON, then the data up to the last offset.
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = stream.read(64)
        if b"git-lfs" in start:
            raise UserError(f"{file} is a pointer of git-lfs, not the file; fetch it with git lfs pull")
        try:
            if length > size - 8:
                raise ValueError(f"its header would take {length:,} bytes")
            header = json.loads(start[:length] + stream.read(max(0, length - 64)))
            header.pop("__metadata__", None)
            end = 8 + length + max((value["data_offsets"][1] for value in header.values()), default=0)
            headers = {name: Tensor(value["dtype"], tuple(value["shape"])) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}, {size:,} bytes long, is not a safetensors file: {error}") from error
    if end != size:
        problem = "cut short: fetch it again" if size < end else "longer than it should be"
        raise UserError(f"{file} is {size:,} bytes long where its header says {end:,}; it is {problem}")
    return headers
