"""Uncertainty weighting (Kendall et al. 2018) with one learned log-variance s_i per task.

The objective is sum_i 0.5 (exp(-s_i) L_i + s_i). Its gradient for s_i, 0.5 (1 - exp(-s_i) L_i), needs only
the task's loss, so s is stepped here with Adam after each update and the model sees weights exp(-s_i),
normalised over the tasks present like those of every other mode: the learning rate keeps its meaning, and
only the ratios of the weights are this method's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mft.errors import ranged
from mft.loss.adaptive import Adaptive
from mft.loss.task_history import Adam


@dataclass
class Uncertainty(Adaptive):
    """Weights exp(-s_i) of the learned log-variances; see the module for the objective."""

    public_name: ClassVar[str] = "uncertainty"
    takes_weights: ClassVar[bool] = False
    arrays: ClassVar[tuple[str, ...]] = ("s",)
    parts: ClassVar[tuple[str, ...]] = ("adam",)

    lr: float = ranged(0.025, above=0)
    """Learning rate of the log-variances s (Adam)."""
    start_value: float = 0.0
    """Every s before training; only differences matter for the weights."""

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        self.s_K = np.full(len(self.names), self.start_value)
        self.adam = Adam(self.names, self.lr)

    def wants_train(self, step: int) -> bool:
        return True

    def learn_train(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        values = self.logged(s=self.s_K)
        present_K = np.isfinite(loss_K)
        # of sum_i 0.5 (exp(-s_i) L_i + s_i) for s_i
        gradient_K = 0.5 * (1 - np.exp(-self.s_K) * np.where(present_K, loss_K, 0.0))
        self.s_K = self.adam.stepped(self.s_K, gradient_K, present_K)
        # exp(min s) cancels in the normalised weights; without it exp(-s) of a very certain task overflows
        self.weigh(np.exp(-(self.s_K - self.s_K.min())))
        return values
