"""Samples → rows, and rows → the tensors of a micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mft.batch import IGNORE, Batch, Row, Sample, Span
from mft.data.settings import PadTo


class RowBuilder(ABC):
    """Groups samples into rows of at most `seq_length` tokens. Subclasses are dataclasses of plain values."""

    splits_samples: ClassVar[bool] = False
    """Whether a sample may begin in one row and end in another."""
    packs_samples: ClassVar[bool] = True
    """Whether a row may hold more than one sample."""

    @property
    def by_length(self) -> bool:
        """Whether rows of similar length are to meet in a micro-batch."""
        return False

    def window(self, configured: int) -> int:
        """Returns how many samples are made into rows together; configured: data.window."""
        return configured

    def groups(self, rows: list[Row], lengths: Sequence[int] | np.ndarray) -> list[list[Row]]:
        """Returns the rows of a window in groups, which stay together in training; each row once."""
        return [[row] for row in rows]

    @abstractmethod
    def rows(self, lengths: Sequence[int] | np.ndarray, seq_length: int) -> list[Row]:
        """Returns rows of indices into `lengths`, or of spans: every token once, no row above seq_length."""

    def width(self, longest: int, seq_length: int) -> int:
        """Returns T of a micro-batch whose longest row has `longest` tokens."""
        return longest

    def collate(self, rows: Sequence[Sequence[Sample]], pad_id: int, seq_length: int) -> Batch:
        """Returns the Batch of B = len(rows) rows, T at least 1. A row without samples is all padding."""
        import torch

        longest = max((sum(len(sample.ids_S) for sample in row) for row in rows), default=0)
        shape = (len(rows), max(1, self.width(longest, seq_length)))
        padding = (pad_id, IGNORE, -1, -1, 0)
        tensors = [np.full(shape, value, np.int64) for value in padding]
        ids_BT, target_BT, task_BT, sample_BT, position_BT = tensors
        named: list[tuple[int, int]] = []
        for b, row in enumerate(rows):
            start = 0
            for sample in row:
                stop = start + len(sample.ids_S)
                ids_BT[b, start:stop] = sample.ids_S
                # targets are shifted here, once, so that no later stage has to know where a sample ends
                target_BT[b, start : stop - 1] = np.where(sample.trained_S[1:], sample.ids_S[1:], IGNORE)
                target_BT[b, stop - 1] = sample.following
                task_BT[b, start:stop] = sample.task
                sample_BT[b, start:stop] = len(named)
                position_BT[b, start:stop] = np.arange(stop - start)
                named.append((sample.task, sample.index))
                start = stop
        ids, target, task, sample_of, position = map(torch.from_numpy, tensors)
        return Batch(ids, target, task, sample_of, position, tuple(named))


@dataclass
class Pad(RowBuilder):
    """A sample a row, padded on the right."""

    public_name: ClassVar[str] = "pad"
    packs_samples: ClassVar[bool] = False

    pad_to: PadTo = PadTo.longest
    """longest (of the micro-batch), or seq_length: always that width."""
    length_group: int = 4
    """Samples of similar length that follow each other in training; 1 = samples come as they are drawn. Means
    nothing for pad_to=seq_length."""

    @property
    def by_length(self) -> bool:
        return self.pad_to == PadTo.longest

    def window(self, configured: int) -> int:
        # 50 groups: more would fill better, and bring the same samples together in every epoch
        return 50 * self.length_group if self._grouped else configured

    def groups(self, rows: list[Row], lengths: Sequence[int] | np.ndarray) -> list[list[Row]]:
        if not self._grouped:
            return super().groups(rows, lengths)
        # Sorted inside a window only: over all samples the groups would be the same in every epoch.
        ordered = sorted(rows, key=lambda row: int(lengths[row[0]]), reverse=True)  # type: ignore[index]
        return [ordered[i : i + self.length_group] for i in range(0, len(ordered), self.length_group)]

    @property
    def _grouped(self) -> bool:
        return self.by_length and self.length_group > 1

    def rows(self, lengths: Sequence[int] | np.ndarray, seq_length: int) -> list[Row]:
        return [[i] for i in range(len(lengths))]

    def width(self, longest: int, seq_length: int) -> int:
        return longest if self.by_length else seq_length


@dataclass
class Pack(RowBuilder):
    """Whole samples side by side in a row, best-fit decreasing; `sample_BT` keeps them apart in attention."""

    public_name: ClassVar[str] = "pack"

    def rows(self, lengths: Sequence[int] | np.ndarray, seq_length: int) -> list[Row]:
        # Best-fit decreasing: the longest first, each into the fullest row that still takes it. The sorted
        # list of free spaces makes it n log n in comparisons.
        lengths = np.asarray(lengths)
        assert not (lengths > seq_length).any(), "the store deals with samples longer than seq_length"
        rows: list[Row] = []
        spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted
        for i in np.argsort(-lengths, kind="stable").tolist():
            length = int(lengths[i])
            best = bisect_left(spaces, (length, -1))  # the fullest row that still takes it
            if best < len(spaces):
                free, row = spaces.pop(best)
                rows[row].append(i)
            else:
                free, row = seq_length, len(rows)
                rows.append([i])
            if free > length:
                insort(spaces, (free - length, row))
        return rows


@dataclass
class Concat(RowBuilder):
    """The samples of a window end to end, cut every `seq_length` tokens: for pretraining on plain text.

    The rest of a sample at the end of a row continues in the next one; only the last row of a window may be
    shorter. No token is lost, neither as input nor as target: the last position of a row predicts the first
    token of the next. A part of a sample sees itself alone, and its positions count from 0.
    """

    public_name: ClassVar[str] = "concat"
    splits_samples = True

    def rows(self, lengths: Sequence[int] | np.ndarray, seq_length: int) -> list[Row]:
        rows: list[Row] = [[]]
        free = seq_length
        for i, length in enumerate(np.asarray(lengths).tolist()):
            start = 0
            while start < length:
                if not free:
                    rows.append([])
                    free = seq_length
                stop = min(length, start + free)
                rows[-1].append(Span(i, start, stop))
                free -= stop - start
                start = stop
        return rows if rows[-1] else []  # a window without samples
