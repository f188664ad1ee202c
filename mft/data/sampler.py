"""Which samples come next: a function of (seed, epoch, position); and how ranks divide a step.

Shapes: N samples, K tasks, G groups of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mft.batch import Row, Span
from mft.data.cache.store import Samples
from mft.data.mixture import Streams, spaced
from mft.data.packing import RowBuilder
from mft.errors import UserError

EVAL_WINDOW = 4096
"""Samples of a validation that are made into rows together; data.window is tuned for training."""


class Sampler:
    """The rows of each optimizer step, for the whole world.

    The samples of an epoch come in an order in which every task is spaced evenly (`Streams`), cut into
    windows of at least as many samples as the row builder wants (one where there are fewer). A window is made
    into rows, which are put in an order of their own, because a row builder's runs from long samples to short
    ones. The state is (epoch, position), position = rows of the epoch already handed out.
    """

    def __init__(
        self,
        samples: Samples,
        rows: RowBuilder,
        seq_length: int,
        rows_per_step: int,
        seed: int = 0,
        window: int = 4096,
        count_K: Sequence[float] | np.ndarray | None = None,
    ):
        """rows_per_step: rows of one optimizer step, over all ranks and micro-batches. count_K: samples of
        each task in an epoch, None = each sample once. Raises UserError where there are no samples."""
        if not len(samples):
            raise UserError("data.split: no sample is left for training; enlarge its part, e.g. [95,5,0]")
        self.samples, self.builder, self.seq_length = samples, rows, seq_length
        self.rows_per_step, self.seed, self.window = rows_per_step, seed, window
        self.streams = Streams(samples.totals()[0], count_K, seed)
        self._rows_of_windows: dict[int, list[int]] = {}

    def rows_in_epoch(self, epoch: int) -> int:
        """Returns the number of rows of an epoch; packed, it may differ by a few from epoch to epoch."""
        return sum(self._counts(epoch))

    def steps_in_epoch(self, epoch: int) -> int:
        """Returns the number of steps of an epoch, the incomplete last one included."""
        return -(-self.rows_in_epoch(epoch) // self.rows_per_step)

    def steps(self, epoch: int = 0, position: int = 0) -> Iterator[tuple[list[Row], tuple[int, int]]]:
        """Yields (rows, (epoch, position) after them), `rows_per_step` rows each, epoch after epoch without
        end.

        Starting from a yielded (epoch, position) continues with the very next step. A step never spans two
        epochs: the last one of an epoch is filled with empty rows, and the state after it is (epoch + 1, 0).
        """
        while True:
            waiting: list[Row] = []  # rows of a window that do not fill a step yet
            counts = self._counts(epoch)
            total, skip = sum(counts), position
            for number, part in enumerate(self._windows(epoch)):
                if skip >= counts[number]:  # windows before the position are counted, not made into rows
                    skip -= counts[number]
                    continue
                waiting += self._rows(epoch, number, part)[skip:]
                skip = 0
                while len(waiting) >= self.rows_per_step:
                    step, waiting = waiting[: self.rows_per_step], waiting[self.rows_per_step :]
                    position += len(step)
                    yield step, (epoch, position) if position < total else (epoch + 1, 0)
            if waiting:
                yield waiting + [[] for _ in range(self.rows_per_step - len(waiting))], (epoch + 1, 0)
            epoch, position = epoch + 1, 0

    def _counts(self, epoch: int) -> list[int]:
        """Returns the number of rows of each window."""
        # Making rows is the only way to count them under packing; the numbers are kept for a resumed position
        # and for the length of the run.
        if epoch not in self._rows_of_windows:
            lengths_N = self.samples.lengths_N
            rows = [self.builder.rows(lengths_N[part], self.seq_length) for part in self._windows(epoch)]
            self._rows_of_windows[epoch] = [len(r) for r in rows]
        return self._rows_of_windows[epoch]

    def _windows(self, epoch: int) -> list[np.ndarray]:
        order_N = self.streams.epoch(epoch)
        size = self.builder.window(self.window)
        # The last window takes the rest, so that none is smaller than `size`: small ones fill rows badly.
        return np.split(order_N, range(size, len(order_N) - size + 1, size))

    def _rows(self, epoch: int, number: int, part: np.ndarray) -> list[Row]:
        """Returns the rows of a window in their order, in which each task is spaced evenly."""
        lengths = self.samples.lengths_N[part]
        tasks = self.samples.task_N[part]
        groups = self.builder.groups(self.builder.rows(lengths, self.seq_length), lengths)
        # A row of several tasks stands for its rarest one, which uneven spacing would hurt most.
        rank_K = np.argsort(np.argsort(np.bincount(tasks), kind="stable"))
        rarity = rank_K[tasks].tolist()
        labels = []
        for group in groups:
            numbers = [item.sample if isinstance(item, Span) else item for row in group for item in row]
            labels.append(min(rarity[number] for number in numbers))
        order_G = spaced(np.array(labels), np.random.default_rng([self.seed, 2, epoch, number]))
        return _renumbered([row for g in order_G for row in groups[g]], part)


def _renumbered(rows: list[Row], number_N: np.ndarray) -> list[Row]:
    """Returns rows of indices into `number_N` as rows of the numbers there."""
    numbers = number_N.tolist()

    def of(item: int | Span) -> int | Span:
        return item._replace(sample=numbers[item.sample]) if isinstance(item, Span) else numbers[item]

    return [[of(item) for item in row] for row in rows]


def deal(
    rows: list[Row], rank: int, world: int, accumulation: int, length: Callable[[Row], int] | None = None
) -> list[list[Row]]:
    """Returns the micro-batches of one rank: `accumulation` lists of equally many rows.

    Over all ranks and micro-batches every row is dealt exactly once; len(rows) is a multiple of world ×
    accumulation. Rows go round like cards, so that the empty rows of an incomplete step spread over the
    ranks. Where the length of a row is given, those of similar length meet: the longest micro-batches come
    first (what does not fit into memory shows at once), and those that the ranks work on at the same time are
    neighbours.
    """
    hands = world * accumulation
    assert len(rows) % hands == 0, f"{len(rows)} rows for {world} ranks × {accumulation} micro-batches"
    if length is None:
        return [rows[micro * world + rank :: hands] for micro in range(accumulation)]
    # hand h goes to rank h % world: the ranks' micro-batches of one round are neighbours in length
    ordered, size = sorted(rows, key=length, reverse=True), len(rows) // hands
    return [ordered[hand * size : (hand + 1) * size] for hand in range(rank, hands, world)]


def spread(samples: Samples, per_task: int | None) -> np.ndarray:
    """Returns the numbers of at most `per_task` samples of each task (0, None: all), evenly spaced over it.

    Evenly, because files are often sorted: the first ones would stand for one source only.
    """
    chosen = []
    for numbers in _numbers_by_task(samples):
        if per_task and per_task < len(numbers):
            numbers = numbers[np.arange(per_task) * len(numbers) // per_task]
        chosen.append(numbers)
    return np.concatenate(chosen)


def draw(samples: Samples, per_task: int, seed: int, step: int) -> np.ndarray:
    """Returns the numbers of at most `per_task` samples of each task, a function of (seed, step)."""
    random = np.random.default_rng([seed, step])
    chosen = []
    for numbers in _numbers_by_task(samples):
        chosen.append(random.choice(numbers, min(per_task, len(numbers)), replace=False))
    return np.concatenate(chosen)


def _numbers_by_task(samples: Samples) -> list[np.ndarray]:
    return [np.flatnonzero(samples.task_N == task) for task in range(len(samples.stores))]


def eval_batches(
    samples: Samples,
    numbers: np.ndarray,
    rows: RowBuilder,
    seq_length: int,
    per_device: int,
    rank: int = 0,
    world: int = 1,
) -> list[list[Row]]:
    """Returns one rank's micro-batches of the samples of these numbers, at most `per_device` rows each.

    Every rank gets equally many (collective backends need that), the last ones filled with empty rows.
    """
    dealt_rows: list[Row] = []
    for part in np.array_split(numbers, max(1, len(numbers) // EVAL_WINDOW)):
        dealt_rows += _renumbered(rows.rows(samples.lengths_N[part], seq_length), part)
    rounds = -(-len(dealt_rows) // (world * per_device))
    if not rounds:
        return []
    # micro-batches of as equal a size as there can be: then the fewest rows are empty
    dealt_rows += [[] for _ in range(-len(dealt_rows) % (world * rounds))]
    return deal(dealt_rows, rank, world, rounds, samples.row_length if rows.by_length else None)
