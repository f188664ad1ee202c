"""Books of the memory that tensors hold: each storage, from the operation that made it until it is freed.

It counts real tensors as well as fake ones, which have sizes and no values. What a kernel takes inside itself
is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

TEMPORARY = "temporary"
"""What nobody owns: results on their way, kept for the backward pass or not."""


class Ledger(TorchDispatchMode):
    """Books the storages that are made within it.

    naming: (result, operation, its arguments) → what a new storage is part of, None = TEMPORARY.
    """

    def __init__(self, naming: Callable[[torch.Tensor, Any, Any], str | None] | None = None):
        super().__init__()
        self.naming = naming
        self.parts: list[str] = []
        """What each storage is part of, by its number."""
        self.events: list[tuple[int, int]] = []
        """(number of the storage, bytes that it has from here on; 0 = freed), in their order."""
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # what it consists of comes here by itself
            return NotImplemented
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                self._book(result, func, args)
        return results

    def own(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Says what tensors are part of, from their beginning on; those made elsewhere are booked here."""
        for tensor in tensors:
            self.parts[self._book(tensor, None, ())] = part

    def resized(self, storage: Any) -> None:
        """Books another size of a storage."""
        if (number := self._numbers.get(storage._cdata)) is not None:
            self.events.append((number, storage.nbytes()))

    def held(
        self, until: int | None = None, born_from: int = 0, born_before: int | None = None
    ) -> Counter[str]:
        """Returns the bytes held after the first `until` events, by part; None = all of them.

        born_from, born_before: of storages that are first booked by these events alone.
        """
        sizes: dict[int, int] = {}
        left_out: set[int] = set()
        for index, (number, size) in enumerate(self.events[:until]):
            if number not in sizes and not born_from <= index < (born_before or len(self.events)):
                left_out.add(number)
            sizes[number] = size
        found: Counter[str] = Counter()
        for number in sizes.keys() - left_out:
            found[self.parts[number]] += sizes[number]
        return found

    def peak(self, first: int = 0, last: int | None = None) -> tuple[int, Counter[str]]:
        """Returns after how many events the most is held, from the first to the last, and by which parts."""
        sizes: dict[int, int] = {}
        total = most = 0
        where = first
        last = len(self.events) if last is None else last
        for index, (number, size) in enumerate(self.events[:last], start=1):
            total += size - sizes.get(number, 0)
            sizes[number] = size
            if index >= first and (total > most or index == first):
                most, where = total, index
        return where, self.held(where)

    def _book(self, tensor: torch.Tensor, func: Any, args: Any) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (number := self._numbers.get(key)) is not None:
            return number
        number = self._numbers[key] = len(self.parts)
        named = self.naming(tensor, func, args) if self.naming and func is not None else None
        self.parts.append(named or TEMPORARY)
        self.events.append((number, storage.nbytes()))
        weakref.finalize(storage, self._free, key, number).atexit = False
        return number

    def _free(self, key: int, number: int) -> None:
        del self._numbers[key]
        self.events.append((number, 0))
