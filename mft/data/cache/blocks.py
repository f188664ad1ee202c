"""Checksums of a token cache by blocks: made when it is written, verified when a block is first read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from mft.errors import UserError

BLOCK = 1 << 18
"""Bytes of a block: what a first look at a sample reads and sums up besides (40 microseconds)."""


def sums(path: Path) -> list[str]:
    """Returns the xxh3-64 of every block of a file."""
    with path.open("rb", buffering=0) as file:
        return [xxhash.xxh3_64_hexdigest(block) for block in iter(lambda: file.read(BLOCK), b"")]


class Blocks:
    """A flat array in a file, memory-mapped; each block is verified when it is first read.

    Verifying all at a start would read the whole cache before the first step.
    """

    def __init__(self, path: Path, dtype: str, expected: list[str]):
        self.path, self.expected = path, expected
        self.items = mapped(path, dtype)
        self._bytes = self.items.view(np.uint8)
        self._seen = bytearray(len(expected))
        self._per_block = BLOCK // self.items.itemsize

    def part(self, start: int, stop: int) -> np.ndarray:
        """Returns the items from `start` to `stop`; raises UserError when a block among them is damaged."""
        for block in range(start // self._per_block, (stop - 1) // self._per_block + 1):
            if not self._seen[block]:
                self._check(block)
        return self.items[start:stop]

    def _check(self, block: int) -> None:
        checksum = xxhash.xxh3_64_hexdigest(self._bytes[block * BLOCK : (block + 1) * BLOCK].data)
        if checksum != self.expected[block]:
            meta = self.path.with_name("meta.json")
            meta.unlink(missing_ok=True)  # without it the store is not one, and the next start makes it anew
            raise UserError(
                f"The token cache is damaged: {self.path} has the checksum {checksum} from byte "
                f"{block * BLOCK:,} on, expected {self.expected[block]}. The same command tokenises the "
                f"task anew and resumes; if the cache cannot be written to, remove {self.path.parent}."
            )
        self._seen[block] = 1


def mapped(path: Path, dtype: str) -> np.ndarray:
    """Returns a file as a flat array, mapped into memory."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
