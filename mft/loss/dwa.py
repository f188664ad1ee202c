"""Dynamic weight average (Liu et al. 2019): tasks whose training loss falls slowly get more weight.

Training losses are averaged over windows of steps. With the mean losses of the last two windows,

    r_i = mean_i(last) / mean_i(the one before),   w_i = K softmax_i(r_i / T)

The paper takes epochs as windows; windows of 25 steps are those of the FAMO authors' comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mft.errors import ranged
from mft.loss.adaptive import Adaptive
from mft.loss.task_history import softmax


@dataclass
class Dwa(Adaptive):
    """Weights from the ratio of two windows' training losses; for the first two the static weights hold.

    A task absent from one of the two windows counts as neither faster nor slower (r = 1).
    """

    public_name: ClassVar[str] = "dwa"
    arrays: ClassVar[tuple[str, ...]] = ("sum", "count", "last")

    window: int = ranged(25, min=1)
    """Optimizer steps of a window; 25 in the FAMO authors' comparison, an epoch in the paper."""
    temperature: float = ranged(2.0, above=0)
    """T of softmax(ratio / T); 2 in the paper, smaller spreads the weights."""

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        self.sum_K, self.count_K = np.zeros((2, len(self.names)))
        self.last_K, self.windows = np.full(len(self.names), np.nan), 0

    def check_schedule(self, steps: int, valid_samples: Sequence[int]) -> None:
        self.warn_if_short(steps, 2 * self.window + 1, "window", (steps - 1) // 2)

    def wants_train(self, step: int) -> bool:
        return True

    def learn_train(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        self.sum_K += np.nan_to_num(loss_K, nan=0.0)
        self.count_K += np.isfinite(loss_K)
        if step % self.window:
            return self.logged()
        # NaN: absent from the whole window
        mean_K = np.where(self.count_K > 0, self.sum_K / np.maximum(self.count_K, 1), np.nan)
        last_K, self.last_K = self.last_K, mean_K
        self.sum_K, self.count_K = np.zeros((2, len(self.names)))
        self.windows += 1
        if self.windows < 2:
            return self.logged()
        ratio_K = np.nan_to_num(mean_K / np.where(last_K > 0, last_K, np.nan), nan=1.0)
        values = self.logged(ratio=ratio_K)  # with the weights that this step had
        self.weigh(softmax(ratio_K / self.temperature))
        return values

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"windows": self.windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.windows = int(state["windows"])
