"""Writes a safetensors file one tensor after the other, so that no second copy of them is in memory.

safetensors (0.8) has no such writer: save_file and serialize_file take all tensors at once, those of a GPU as
copies on the CPU, and save_file refuses views that share memory. What is written here is to the byte what
save_file writes. The format: 8 bytes with the length of the header, the header in JSON, the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
"""A dtype of torch → its name in a header. Tensors lie in the file in the reverse of this order."""

CHUNK = 16 << 20
"""Bytes that are copied from a GPU at a time."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors of any shape and device, views included, with text about them.

    Raises KeyError for a dtype that is not in DTYPES, before anything is written. Not atomic.
    """
    header = _header(tensors, metadata)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in _order(tensors):
            for part in _parts(tensors[name]):
                file.write(part)


def size_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Returns the bytes of the file that `write_tensors` would write."""
    return 8 + len(_header(tensors, metadata)) + sum(map(_bytes, tensors.values()))


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in _order(tensors):
        start, end = end, end + _bytes(tensors[name])
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": _dtype(tensors[name]), "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)  # readers map the tensors, which must be aligned


def _order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    # wide types first: each begins at a multiple of its size
    rank = {name: number for number, name in enumerate(DTYPES.values())}
    return sorted(tensors, key=lambda name: (-rank[_dtype(tensors[name])], name))


def _dtype(tensor: torch.Tensor) -> str:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _parts(tensor: torch.Tensor) -> Iterator[Any]:
    """Yields the bytes of a tensor as arrays: its own memory, or a copy of at most CHUNK bytes."""
    import torch

    flat = tensor.detach().reshape(-1)
    for part in flat.split(CHUNK // tensor.element_size()):
        yield part.cpu().view(torch.uint8).numpy()
