"""The data as one rank's loop sees it: the micro-batches of each step, validation and probe."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Protocol

import numpy as np

from mft.batch import Batch, BatchSizes, Row, Sample, StepBatches
from mft.data.cache.store import Samples, Store
from mft.data.mixture import account, counts_per_epoch
from mft.data.packing import RowBuilder
from mft.data.sampler import Sampler, deal, draw, eval_batches, spread
from mft.data.settings import DataSettings


class LoopSettings(Protocol):
    """Those of the training loop's settings (`train`) that say which rows it takes."""

    epochs: float
    max_steps: int | None
    seed: int
    eval_samples: int | None
    per_device_eval_batch_size: int


class BatchLoader:
    """Turns stores into micro-batches.

    sizes: of a step; rank: this one; train, data: the settings of these names; shares: of the tasks in the
    mixture (`task.<name>.share`), None = 1.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        rows: RowBuilder,
        sizes: BatchSizes,
        rank: int,
        pad_id: int,
        train: LoopSettings,
        data: DataSettings,
        shares: Sequence[float | None],
    ):
        self.rows, self.sizes, self.rank, self.pad_id = rows, sizes, rank, pad_id
        self.settings, self.data = train, data
        samples = Samples(stores, "train", data.limit)
        self.train_samples, self.valid_samples = samples, Samples(stores, "valid")
        self.test_samples = Samples(stores, "test")
        count_K = counts_per_epoch(samples, shares, data)
        self.sampler = Sampler(samples, rows, data.seq_length, sizes.total, train.seed, data.window, count_K)

    def total_steps(self) -> int:
        """Returns the optimizer steps of the run: train.epochs passes, at most train.max_steps."""
        limit = self.settings.max_steps or math.inf
        full_epochs, fraction = int(self.settings.epochs), self.settings.epochs % 1
        total = 0
        for epoch in range(full_epochs):
            total += self.sampler.steps_in_epoch(epoch)
            if total >= limit:  # the rows of each epoch have to be made to be counted: no more than needed
                return int(limit)
        if fraction:
            total += math.ceil(fraction * self.sampler.steps_in_epoch(full_epochs))
        return int(min(total, limit))

    def mixture(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Returns what the run takes of each task, see `mixture.account`."""
        # max_steps may end the run inside an epoch: the full epochs, and a fraction of the last one.
        left, epoch = self.total_steps(), 0
        while left > (steps := self.sampler.steps_in_epoch(epoch)):
            left, epoch = left - steps, epoch + 1
        return account(self.train_samples, names, self.sampler.streams, epoch + left / steps)

    def valid_counts(self, tasks: int) -> list[int]:
        """Returns the number of validation samples of each task."""
        return np.bincount(self.valid_samples.task_N, minlength=tasks).tolist()

    def steps(self, epoch: int, rows_consumed: int, count: int | None = None) -> Generator[StepBatches]:
        """Yields this rank's micro-batches of every step, from so many rows into an epoch on.

        count: of the steps; None: without end, over as many epochs as it takes.
        """
        coming = islice(self.sampler.steps(epoch, rows_consumed), count)
        for rows, (epoch, rows_consumed) in coming:
            length = self.train_samples.row_length if self.rows.by_length else None
            dealt = deal(rows, self.rank, self.sizes.world, self.sizes.accumulation, length)
            # (epoch, rows_consumed) stands after the step, which is what a checkpoint resumes from
            epochs_done = epoch + rows_consumed / max(1, self.sampler.rows_in_epoch(epoch))
            batches = list(self._batches(self.train_samples, dealt))
            yield StepBatches(batches, epoch, rows_consumed, epochs_done)

    def validation(self) -> Iterator[Batch]:
        """Yields this rank's micro-batches of a validation, the same every time."""
        return self._evaluation(self.valid_samples, spread(self.valid_samples, self.settings.eval_samples))

    def test(self) -> Iterator[Batch]:
        """Yields this rank's micro-batches of the test split: all of it, whatever train.eval_samples."""
        return self._evaluation(self.test_samples, np.arange(len(self.test_samples)))

    def probe(self, step: int, per_task: int) -> Iterator[Batch]:
        """Yields this rank's micro-batches of a probe: validation samples drawn anew for every step."""
        chosen = draw(self.valid_samples, per_task, self.settings.seed, step)
        return self._evaluation(self.valid_samples, chosen)

    def largest(self, rows: int) -> Batch:
        """Returns a micro-batch of so many rows that takes as much memory as any of the run: each as long as
        rows get, every token with loss."""
        samples, longest = self.train_samples, np.argsort(-self.train_samples.lengths_N, kind="stable")
        row: list[Sample] = []
        free = self.data.seq_length
        for number in cycle(longest.tolist()):
            sample = samples.sample(number)
            ids_S = sample.ids_S[:free]
            row.append(replace(sample, ids_S=ids_S, trained_S=np.ones(len(ids_S), bool)))
            free -= len(ids_S)
            if not (free and self.rows.packs_samples):
                break
        return self.rows.collate([row] * rows, self.pad_id, self.data.seq_length)

    def _evaluation(self, samples: Samples, numbers: np.ndarray) -> Iterator[Batch]:
        per_device, seq_length = self.settings.per_device_eval_batch_size, self.data.seq_length
        dealt = eval_batches(samples, numbers, self.rows, seq_length, per_device, self.rank, self.sizes.world)
        return self._batches(samples, dealt)

    def _batches(self, samples: Samples, dealt: Sequence[Sequence[Row]]) -> Iterator[Batch]:
        # one after the other: those of a large test split would fill the memory
        return (self.rows.collate(samples.load(rows), self.pad_id, self.data.seq_length) for rows in dealt)
