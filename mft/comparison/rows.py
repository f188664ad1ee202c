"""Losses of single validation rows, so that two runs can be compared row by row.

Shapes: N rows of a task that all runs at hand were validated on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mft.comparison.statistics import PairedRows
from mft.training import sample_losses


class RowLosses(NamedTuple):
    """The validated rows of one task, ascending by key."""

    row_N: np.ndarray
    """uint64: the digest of the conversation, the same in all runs and task sets."""
    tokens_N: np.ndarray
    """float64: trained tokens."""
    loss_N: np.ndarray
    """float64: sum of the losses of these tokens, in nats."""


Weighted = tuple[Mapping[str, float], Mapping[str, RowLosses]]
"""The part of each task in a metric, and its rows."""


@cache
def of_run(folder: Path, split: str, step: int) -> Mapping[str, RowLosses]:
    """Returns the row losses of a validation by task; {} where they were not kept, or are damaged."""
    frame = sample_losses.read(folder, split, step)
    if frame is None:
        return {}
    result = {}
    for task, part in frame.sort_values("row").groupby("task", observed=True):
        losses = (part[name].to_numpy(np.float64) for name in ("tokens", "loss"))
        result[str(task)] = RowLosses(part["row"].to_numpy(), *losses)
    return result


def paired_rows(pairs: Sequence[tuple[Weighted, Weighted]]) -> list[PairedRows]:
    """Returns the rows that both runs of every pair know, of every task that counts in the metric.

    pairs: for each seed, the parts of the tasks in the metric (1 / K in a mean over K tasks) and the rows, of
    the setting and of the other one. [] where one of these tasks has no two rows in common.
    `PairedRows.complete` says whether all rows of all runs are among them.
    """
    tasks = dict.fromkeys(task for pair in pairs for weights, _ in pair for task in weights)
    result = []
    for task in tasks:
        sides = [rows[task] for pair in pairs for _, rows in pair if task in rows]
        if len(sides) < 2 * len(pairs):
            return []
        common = sides[0].row_N
        for side in sides[1:]:
            if not np.array_equal(side.row_N, common):
                common = np.intersect1d(common, side.row_N, assume_unique=True)
        tokens_N = sides[0].tokens_N[np.searchsorted(sides[0].row_N, common)]
        if len(common) < 2 or not tokens_N.sum() > 0:
            return []
        loss_N = iter(_sums(side, common, tokens_N) for side in sides)
        difference = [
            mine.get(task, 0.0) * next(loss_N) - theirs.get(task, 0.0) * next(loss_N)
            for (mine, _), (theirs, _) in pairs
        ]
        complete = all(len(side.row_N) == len(common) for side in sides)
        result.append(PairedRows(np.stack(difference), tokens_N, complete))
    return result


def differ(pairs: Sequence[tuple[Weighted, Weighted]]) -> tuple[bool, bool]:
    """Returns whether the runs of a pair were validated on different rows, and on different tokens of one."""
    rows = tokens = False
    for (weights, mine), (_, theirs) in pairs:
        for task in weights.keys() & mine.keys() & theirs.keys():
            one, other = mine[task], theirs[task]
            if np.array_equal(one.row_N, other.row_N):
                tokens |= not np.array_equal(one.tokens_N, other.tokens_N)
                continue
            rows = True
            _, at, there = np.intersect1d(one.row_N, other.row_N, assume_unique=True, return_indices=True)
            tokens |= not np.array_equal(one.tokens_N[at], other.tokens_N[there])
    return rows, tokens


def _sums(side: RowLosses, common: np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
    """Returns the loss sums of the common rows, as they would be had the rows so many tokens.

    Another tokenizer, template or limit of length gives a row other tokens. What each row adds to the loss
    per token stays the same, and so does that loss.
    """
    places = np.searchsorted(side.row_N, common)
    loss_N, own_N = side.loss_N[places], side.tokens_N[places]
    if np.array_equal(own_N, tokens_N) or not own_N.sum() > 0:
        return loss_N
    mean = loss_N.sum() / own_N.sum()
    influence_N: np.ndarray = (loss_N - mean * own_N) * (tokens_N.sum() / own_N.sum())
    return mean * tokens_N + influence_N
