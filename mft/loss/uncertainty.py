"""Uncertainty weighting (Kendall et al. 2018) with one learned log-variance s_i per task.

The objective is sum_i 0.5 (exp(-s_i) L_i + s_i). Its gradient for s_i, 0.5 (1 - exp(-s_i) L_i), needs only
the task's loss, so s is stepped here with Adam after each update and the model sees weights exp(-s_i),
normalised over the tasks present like those of every other mode: the learning rate keeps its meaning, and
only the ratios of the weights are this method's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mft.errors import check_ranges, ranged
from mft.loss.adaptive import Adam, Adaptive, arrays, by_task


@dataclass
class Uncertainty(Adaptive):
    """See the module for the formula, conf/loss/uncertainty.yaml for the fields."""

    public_name: ClassVar[str] = "uncertainty"

    lr: float = ranged(0.025, above=0)
    """Learning rate of the log-variances s (Adam)."""
    start_value: float = 0.0
    """Every s before training; only differences matter for the weights."""

    def __post_init__(self) -> None:
        check_ranges(self, "loss")

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        if len(set(weights)) > 1:
            warnings.warn(
                "loss=uncertainty learns the weights; task.<name>.weight does nothing", stacklevel=2
            )
        super().setup(names, [1.0] * len(names))
        self.s_K = np.full(len(self.names), self.start_value)
        self.adam = Adam(len(self.names), self.lr)

    def wants_train(self, step: int) -> bool:
        return True

    def learn_train(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        values = self.logged(s=self.s_K)
        here_K = np.isfinite(loss_K)
        gradient_K = 0.5 * (1 - np.exp(-self.s_K) * np.where(here_K, loss_K, 0.0))
        self.s_K = self.adam.stepped(self.s_K, gradient_K, here_K)
        self.weigh(np.exp(-(self.s_K - self.s_K.min())))
        return values

    def state_dict(self) -> dict[str, Any]:
        return (
            super().state_dict()
            | by_task(self.names, s=self.s_K)
            | {"adam": self.adam.state_dict(self.names)}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        (self.s_K,) = arrays(state, self.names, "s")
        self.adam.load_state_dict(state["adam"], self.names)
