"""How often each task's samples come, and in which order: the mixture of an epoch.

Shapes: K tasks, N samples of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mft.console import tables
from mft.data.cache.store import Samples
from mft.data.settings import DataSettings, Mixture, MixtureBy
from mft.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

BLOCK = 4096
"""Samples of a stream that are permuted by one generator, at least: a task of three samples that is taken
10,000 times would otherwise start as many generators."""


class Streams:
    """The endless stream of each task, and the stretch of it that an epoch takes.

    A stream is pass after pass over the task's samples, each pass with its own permutation. Epoch e takes the
    positions from e x count to (e + 1) x count, so a task of which an epoch takes half shows its other half
    in the next one, and a task taken twice shows every sample twice. size_K: samples of each task, numbered
    through task after task; count_K: how many an epoch takes, with fractions; None = each of them once.
    """

    def __init__(
        self, size_K: Sequence[int] | np.ndarray, count_K: Sequence[float] | np.ndarray | None, seed: int
    ):
        self.size_K = np.asarray(size_K, np.int64)
        self.count_K = np.asarray(self.size_K if count_K is None else count_K, np.float64)
        self.first_K = np.cumsum(self.size_K) - self.size_K
        self.seed = seed

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the numbers of an epoch's samples in their order, a function of (seed, epoch).

        Every stretch of it holds each task in proportion (see `spaced`).
        """
        stretches = [self._stretch(task, *self._positions(task, epoch)) for task in range(len(self.size_K))]
        task_N = np.repeat(np.arange(len(stretches)), [len(s) for s in stretches])
        numbers_N = np.concatenate([*stretches, np.empty(0, np.int64)]).astype(np.int64)
        return numbers_N[spaced(task_N, np.random.default_rng([self.seed, 1, epoch]))]

    def taken(self, epochs: float) -> np.ndarray:
        """Returns float64 [K]: the samples taken of each task in so many epochs, a fraction in proportion."""
        last = int(epochs)
        bounds = [self._positions(task, last) for task in range(len(self.size_K))]
        start_K, stop_K = np.array(bounds, np.float64).reshape(-1, 2).T
        return start_K + (epochs - last) * (stop_K - start_K)

    def _positions(self, task: int, epoch: int) -> tuple[int, int]:
        # Rounded up, so that the first epoch has something of every task; before that to 6 places, because a
        # share is a float and 100.0000000001 samples are 100.
        start, stop = (int(np.ceil(round(e * self.count_K[task], 6))) for e in (epoch, epoch + 1))
        return start, stop

    def _stretch(self, task: int, start: int, stop: int) -> np.ndarray:
        size = int(self.size_K[task])
        if stop <= start or not size:
            return np.empty(0, np.int64)
        # Seeded by block, so that any stretch of the endless stream is made without what comes before it.
        passes = max(1, BLOCK // size)
        block = passes * size
        numbers = []
        for b in range(start // block, (stop - 1) // block + 1):
            random = np.random.default_rng([self.seed, 0, task, b])
            order = random.permuted(np.tile(np.arange(size), (passes, 1)), axis=1).ravel()
            numbers.append(order[max(0, start - b * block) : stop - b * block])
        # numbered through task after task, as in `Samples`
        return self.first_K[task] + np.concatenate(numbers)


def spaced(label_N: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns an order of N things in which each label comes at even distances, otherwise random.

    The i-th of the n things of a label stands at (i + offset) / n. So a stretch of M things of L labels holds
    a label that makes up a part p of all at least p (M - 2 L) - 1 times; a plain shuffle may leave it out.
    """
    # Shuffled first: equal positions, and the things of one label, then come in random order.
    order_N = random.permutation(len(label_N))
    shuffled_N = np.asarray(label_N)[order_N]
    position_N = np.empty(len(order_N))
    for label in np.unique(shuffled_N):
        at = np.flatnonzero(shuffled_N == label)
        position_N[at] = (np.arange(len(at)) + random.random()) / len(at)
    return order_N[np.argsort(position_N, kind="stable")]


def counts_per_epoch(samples: Samples, shares: Sequence[float | None], settings: DataSettings) -> np.ndarray:
    """Returns float64 [K]: the samples that an epoch takes of each task.

    An epoch keeps the length of the natural one, in samples or in trained tokens. shares:
    `task.<name>.share`, None = 1. Raises UserError where no task has anything to give.
    """
    size_K, trained_K = samples.totals()
    if settings.mixture == Mixture.natural:
        return size_K.astype(np.float64)
    by_tokens = settings.mixture_by == MixtureBy.tokens
    amount_K = trained_K if by_tokens else size_K.astype(np.float64)
    if settings.mixture == Mixture.temperature:
        part_K = amount_K ** (1 / settings.mixture_temperature)
    else:
        part_K = np.array([1.0 if share is None else share for share in shares]) * (size_K > 0)
    if not part_K.sum() > 0:
        raise UserError("task.<name>.share: no task with a share above 0 has a training sample")
    # An epoch keeps the size of the natural one, so that epochs and steps mean the same under any mixture.
    wanted_K = part_K / part_K.sum() * amount_K.sum()
    # samples of a task = its tokens over its tokens per sample
    return wanted_K * size_K / np.maximum(amount_K, 1) if by_tokens else wanted_K


def account(
    samples: Samples, names: Sequence[str], streams: Streams, epochs: float
) -> dict[str, dict[str, float]]:
    """Returns what a run of so many epochs takes of each task.

    samples: how many there are; share, trained_share: its part of all samples and of all trained tokens, of
    1; natural_share: its part of all samples there are; epochs: how often each of its samples comes.
    """
    size_K, trained_K = samples.totals()
    taken_K = streams.taken(epochs)
    tokens_K = taken_K * trained_K / np.maximum(size_K, 1)
    amounts = {"natural_share": size_K, "share": taken_K, "trained_share": tokens_K}
    accounts: dict[str, dict[str, float]] = {}
    for k, name in enumerate(names):
        parts = {key: float(amount_K[k] / max(1, amount_K.sum())) for key, amount_K in amounts.items()}
        accounts[name] = {
            "samples": int(size_K[k]),
            **{key: round(part, 6) for key, part in parts.items()},
            "epochs": round(float(taken_K[k] / max(1, size_K[k])), 4),
        }
    return accounts


def table(accounts: dict[str, dict[str, float]], settings: DataSettings) -> Table:
    """Returns a line for each task of what `account` says."""
    how = Mixture(settings.mixture).value
    if settings.mixture != Mixture.natural:
        how += f", by {MixtureBy(settings.mixture_by).value}"
    rows = []
    for name, a in accounts.items():
        shares = (f"{100 * a[k]:.1f}" for k in ("natural_share", "share", "trained_share"))
        rows.append([name, f"{a['samples']:,}", *shares, f"{a['epochs']:.2f}"])
    numbers = ("samples", "% of all", "% of the run", "% of tokens", "epochs")
    return tables.table(f"mixture: {how}", ["task", *numbers], rows, numbers)
