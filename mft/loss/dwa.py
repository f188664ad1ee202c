"""Dynamic weight average (Liu et al. 2019): tasks whose training loss falls slowly get more weight.

Training losses are averaged over windows of steps. With r_i = mean of the last window / mean of the window
before, w_i = K softmax_i(r_i / T). The paper takes epochs as windows; windows of 25 steps are those of the
FAMO authors' comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mft.errors import check_ranges, ranged
from mft.loss.adaptive import Adaptive, arrays, by_task, softmax, warn_of_a_short_run


@dataclass
class Dwa(Adaptive):
    """Weights from the ratio of two windows' training losses; the static weights hold for the first two
    windows.

    A task absent from one of the two windows counts as neither faster nor slower (r = 1).
    """

    public_name: ClassVar[str] = "dwa"

    window: int = ranged(25, min=1)
    """Optimizer steps of a window; 25 in the FAMO authors' comparison, an epoch in the paper."""
    temperature: float = ranged(2.0, above=0)
    """T of softmax(ratio / T); 2 in the paper, smaller spreads the weights."""

    def __post_init__(self) -> None:
        check_ranges(self, "loss")

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        self.sum_K, self.count_K = np.zeros(len(self.names)), np.zeros(len(self.names))
        self.last_K, self.windows = np.full(len(self.names), np.nan), 0

    def check_schedule(self, steps: int, valid_samples: Sequence[int]) -> None:
        warn_of_a_short_run("dwa", steps, 2 * self.window, "loss.window", self.window, (steps - 1) // 2)

    def wants_train(self, step: int) -> bool:
        return True

    def learn_train(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        self.sum_K += np.nan_to_num(loss_K, nan=0.0)
        self.count_K += np.isfinite(loss_K)
        values = self.logged()
        if step % self.window == 0:
            mean_K = np.where(self.count_K > 0, self.sum_K / np.maximum(self.count_K, 1), np.nan)
            self.windows += 1
            if self.windows > 1:
                ratio_K = np.nan_to_num(mean_K / np.where(self.last_K > 0, self.last_K, np.nan), nan=1.0)
                self.weigh(softmax(ratio_K / self.temperature))
                values |= {
                    f"dwa/ratio/{name}": ratio
                    for name, ratio in zip(self.names, ratio_K.tolist(), strict=True)
                }
            self.last_K = mean_K
            self.sum_K, self.count_K = np.zeros(len(self.names)), np.zeros(len(self.names))
        return values

    def state_dict(self) -> dict[str, Any]:
        own = by_task(self.names, sum=self.sum_K, count=self.count_K, last=self.last_K) | {
            "windows": self.windows
        }
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sum_K, self.count_K, self.last_K = arrays(state, self.names, "sum", "count", "last")
        self.windows = int(state["windows"])
