"""A few samples of a task, cut short around where their loss begins: the data of a rehearsed step.

Shapes: N samples, S tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mft.data.cache.store import Store
from mft.data.split import SPLITS

TOKENS = 32
"""Of a cut sample at most."""

EACH = 2
"""Samples of each split."""

SEARCHED = 256
"""Samples of a split among which those with loss are looked for."""


class ShortRows(Store):
    """What a store hands out of its samples, for a few of them.

    It reads those of another store, whose folder it does not open.
    """

    def __init__(self, store: Store):
        self.store = store
        self._chosen: list[tuple[int, int, int]] = []
        """(number in the store, first token, end) of each sample."""
        splits: list[int] = []
        trained: list[int] = []
        for split in range(len(SPLITS)):
            for number in _with_loss(store, np.flatnonzero(store.split_N == split)[:SEARCHED]):
                _, trained_S = store.sample(number)
                start, stop = _window(trained_S)
                self._chosen.append((number, start, stop))
                splits.append(split)
                trained.append(int(trained_S[start + 1 : stop].sum()))
        self.split_N, self.trained_N = np.array(splits), np.array(trained)
        self.lengths_N = np.array([stop - start for _, start, stop in self._chosen], dtype=np.int32)
        self.digest_N = store.digest_N[[number for number, _, _ in self._chosen]]

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        number, start, stop = self._chosen[i]
        ids_S, trained_S = self.store.sample(number)
        return ids_S[start:stop], trained_S[start:stop]

    def origin(self, i: int) -> str:
        return self.store.origin(self._chosen[i][0])


def _with_loss(store: Store, number_N: np.ndarray) -> list[int]:
    """Returns EACH of these samples, those that carry loss first."""
    ordered = number_N[np.argsort(store.trained_N[number_N] == 0, kind="stable")]
    return [int(number) for number in ordered[:EACH]]


def _window(trained_S: np.ndarray) -> tuple[int, int]:
    """Returns the first token and the end of the part that is kept: as much before the loss as in it."""
    places = np.flatnonzero(trained_S[1:])
    first = int(places[0]) + 1 if len(places) else 0
    start = max(0, first - TOKENS // 2)
    return start, min(len(trained_S), start + TOKENS)


def short(stores: Sequence[Store]) -> list[Store]:
    """Returns a few short samples of each store."""
    return [ShortRows(store) for store in stores]
