"""Steps with a non-finite loss or gradient: never applied, skipped or fatal; which samples caused it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mft.errors import UserError
from mft.training.trainer import ADVICE, Trainer

if TYPE_CHECKING:
    import torch

    from mft.batch import Batch

SAMPLES_NAMED = 5
"""Samples of each rank that a message names at most."""


def propagate_nonfinite(objective: torch.Tensor) -> torch.Tensor:
    """Returns the objective, with a gradient that is not finite where the objective is not.

    The gradient of a loss of inf may be finite. This way the exchange of gradients tells every rank, without
    another exchange and without waiting for the device; a finite objective and its gradient are multiplied by
    exactly 1.
    """
    return objective * (1 + 0 * objective.detach())


def update_applied(
    t: Trainer, step: int, grad_norm: float, batches: Sequence[Batch], nll: Sequence[torch.Tensor]
) -> bool:
    """Returns whether the step's update happened; all ranks agree.

    nll: [B, T] of each micro-batch. A non-finite step is not applied. At most train.skip_nonfinite_steps of
    them are skipped with a warning; the next one raises UserError on all ranks. An overflow that the fp16
    loss scaler answers is not applied either, but no reason for a warning.
    """
    if math.isfinite(grad_norm):
        return True
    culprits = _nonfinite_samples(t, batches, nll)
    if t.engine.skipped and not culprits:
        return False
    message = _message(t, step, culprits)
    if t.state.skipped >= t.settings.skip_nonfinite_steps:
        raise UserError(message)
    t.state.skipped += 1
    if t.engine.is_main:
        allowed = t.settings.skip_nonfinite_steps
        warnings.warn(f"{message} Skipped, {t.state.skipped} of {allowed}.", stacklevel=2)
    return False


def _nonfinite_samples(
    t: Trainer, batches: Sequence[Batch], nll: Sequence[torch.Tensor]
) -> list[tuple[int, int]]:
    """Returns (task, index) of the samples whose loss is not finite, of all ranks; all of them call it."""
    samples: dict[tuple[int, int], None] = {}  # an ordered set
    for batch, nll_BT in zip(batches, nll, strict=True):
        for number in batch.sample_BT[~nll_BT.isfinite()].unique().tolist():
            samples[batch.samples[number]] = None
    by_rank = t.engine.gather(list(samples)[:SAMPLES_NAMED])
    return [sample for own in by_rank for sample in own]


def _message(t: Trainer, step: int, culprits: Sequence[tuple[int, int]]) -> str:
    reason = "every loss is finite, the gradient is not (an overflow)"
    if culprits:
        named = "; ".join(f"task {t.names[task]}, {t.origin((task, index))}" for task, index in culprits)
        reason = f"the loss is not finite for: {named}"
    problem = f"Step {step} has a non-finite loss or gradient and was not applied: {reason}"
    return f"{problem}. {ADVICE}; the last checkpoint is intact."
