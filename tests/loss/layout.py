"""A global batch laid out in different ways: samples with given token losses, in micro-batches, padded or
packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mft.batch import IGNORE, Batch, StepCounts
from mft.loss.base import TaskLoss


@dataclass(frozen=True)
class Piece:
    """A sample as a loss sees it: its task, which positions are trained, where its losses begin in
    `nll_all`."""

    task: int
    trained: tuple[bool, ...]
    first: int


def pieces(tasks: Sequence[int], trained: Sequence[Sequence[bool]]) -> list[Piece]:
    found, first = [], 0
    for task, mask in zip(tasks, trained, strict=True):
        found.append(Piece(task, tuple(bool(value) for value in mask), first))
        first += len(mask)
    return found


def micro_batch(rows: Sequence[Sequence[Piece]], length: int) -> tuple[Batch, torch.Tensor]:
    """Returns a Batch of the rows (each a list of samples) and where each position's token loss lies (-1 =
    padding)."""
    shape = (len(rows), length)
    target_BT, task_BT, sample_BT = (torch.full(shape, value) for value in (IGNORE, -1, -1))
    position_BT, where_BT = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    number = 0
    for i, row in enumerate(rows):
        at = 0
        for piece in row:
            span = slice(at, at + len(piece.trained))
            target_BT[i, span] = torch.where(torch.tensor(piece.trained), 1, IGNORE)
            task_BT[i, span], sample_BT[i, span] = piece.task, number
            position_BT[i, span] = torch.arange(len(piece.trained))
            where_BT[i, span] = piece.first + torch.arange(len(piece.trained))
            number, at = number + 1, at + len(piece.trained)
    return Batch(torch.zeros(shape, dtype=torch.int64), target_BT, task_BT, sample_BT, position_BT), where_BT


def padded(samples: Sequence[Piece]) -> tuple[Batch, torch.Tensor]:
    """One sample a row."""
    return micro_batch([[piece] for piece in samples], max(len(piece.trained) for piece in samples) + 1)


def packed(samples: Sequence[Piece]) -> tuple[Batch, torch.Tensor]:
    """All samples in one row, the longest first, and a row of padding below."""
    row = sorted(samples, key=lambda piece: -len(piece.trained))
    return micro_batch([row, []], sum(len(piece.trained) for piece in row) + 2)


def step(
    loss: TaskLoss, nll_all: torch.Tensor, ranks: Sequence[Sequence[tuple[Batch, torch.Tensor]]]
) -> torch.Tensor:
    """Returns the sum of all shares of one optimizer step: `ranks[r][g]` is micro-batch g of rank r."""
    tasks = len(loss.names)
    vectors = [StepCounts.of([batch for batch, _ in micro], tasks).tensor() for micro in ranks]
    counts = StepCounts.from_tensor(torch.stack(vectors).sum(0))
    both = [(batch, token_losses(nll_all, batch, where_BT)) for micro in ranks for batch, where_BT in micro]
    statistics = (
        sum(loss.statistics(nll_BT.detach(), batch) for batch, nll_BT in both)
        if loss.needs_statistics
        else None
    )
    return sum(loss.share(nll_BT, batch, counts, statistics) for batch, nll_BT in both)


def token_losses(nll_all: torch.Tensor, batch: Batch, where_BT: torch.Tensor) -> torch.Tensor:
    """Returns nll_BT as the model hands it out: 0 where nothing is trained."""
    return torch.where(batch.target_BT != IGNORE, nll_all[where_BT.clamp(min=0)], 0.0)
