"""The objective: the number by which `train.best`, early stopping, sweeps and `mft compare` rank
validations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mft.errors import UserError

BEST = ("mean", "worst", "weighted")
"""What train.best may be besides the name of a task."""

VALID_LOSS = "valid/loss/"
"""The name of a task's validation loss in metrics.jsonl begins with this."""


def losses_by_task(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the validation losses in a row of metrics.jsonl by task; {} where the row holds no
    validation."""
    return {key.removeprefix(VALID_LOSS): value for key, value in row.items() if key.startswith(VALID_LOSS)}


def mean_of_tasks(losses: Mapping[str, float]) -> float:
    """Returns the plain mean of the tasks' losses; NaN when there is none."""
    return sum(losses.values()) / len(losses) if losses else math.nan


def criterion(losses: Mapping[str, float], best: str, weights: Mapping[str, float]) -> float:
    """Returns the number by which a validation is judged, the smaller the better; NaN when no task has a
    loss.

    losses: nats per token, by task. best: mean of the tasks | worst of them | weighted mean by `weights`
    (task.<name>.weight) | the name of one task. Raises UserError for a task without validation samples, and
    where every task that has some has weight 0.
    """
    if not losses:
        return math.nan
    if best == "mean":
        return mean_of_tasks(losses)
    if best == "worst":
        return max(losses.values())
    if best == "weighted":
        total = sum(weights[name] for name in losses)
        if not total > 0:
            raise UserError(
                "train.best=weighted: all tasks with validation samples have weight 0; use train.best=mean."
            )
        # A task of weight 0 is left out, since its loss may be infinite, and 0 x inf is NaN.
        return sum(weights[name] * loss for name, loss in losses.items() if weights[name]) / total
    if best not in losses:
        raise UserError(
            f"train.best={best}: this task has no validation samples; tasks that have some: "
            f"{', '.join(losses)}."
        )
    return losses[best]


def perplexity(loss: float) -> float:
    """Returns exp(loss in nats per token), inf where that is beyond a float."""
    # math.exp raises OverflowError above 709.78.
    return math.exp(loss) if loss < 709 else math.inf
