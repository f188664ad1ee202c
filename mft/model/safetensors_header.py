"""Reads the headers of a model folder's safetensors files: which tensors there are, and whether the files are
complete.

Reads no weights, so that a folder of any size is checked in milliseconds.
"""

from __future__ import annotations

import json
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


def check_files(folder: Path) -> None:
    """Raises UserError for a weight file that is cut short or is none, for a shard that is missing, and for
    shards without an index; reads no weights."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors(file)
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that a model is loaded from, none where there are no safetensors; UserError for
    shards without an index, or one that is missing."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return []
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():  # which is read before any index
        return [single]
    if not index.is_file():
        raise UserError(
            f"{folder} has {files[0].name}, but neither model.safetensors nor {INDEX}, which says where "
            f"weights lie"
        )
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} cannot be read: expected a JSON object with a weight_map ({error})"
        ) from error
    there = {file.name for file in files}
    if absent := sorted(named - there):
        raise UserError(
            f"{index} names {absent[0]}, which is not in the folder{nearest(absent[0], there - named)}; "
            f"{len(absent)} of {len(named)} files are missing"
        )
    return [file for file in files if file.name in named]


def tensors(file: Path) -> dict[str, Tensor]:
    """Returns every tensor of a safetensors file, by name; UserError for a file that is cut short or is
    none."""
    stat = file.stat()
    return _header(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=512)  # a run's parent asks several times
def _header(file: Path, size: int, changed: int) -> dict[str, Tensor]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = stream.read(64)
        if b"git-lfs" in start:
            raise UserError(
                f"{file} is a pointer of git-lfs, not the file itself; fetch it with git lfs pull"
            )
        try:
            if length > size - 8:
                raise ValueError(f"its header would take {length:,} bytes")
            header = json.loads(start[:length] + stream.read(max(0, length - 64)))
            values = {name: value for name, value in header.items() if name != "__metadata__"}
            end = 8 + length + max((value["data_offsets"][1] for value in values.values()), default=0)
            headers = {name: Tensor(value["dtype"], tuple(value["shape"])) for name, value in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}, {size:,} bytes long, is not a safetensors file: {error}") from error
    if end != size:
        what = "cut short: fetch it again" if size < end else "longer than it should be"
        raise UserError(f"{file} is {size:,} bytes long where its header says {end:,}; it is {what}")
    return headers
