"""Loss-balanced task weighting (Liu et al. 2019): tasks that are far from done get more weight.

    w_i = (L_i / L_i(0))^alpha, normalised

The authors take L_i(0) anew at the first batch of each epoch and L_i of the batch at hand; here L_i is the
training loss of the last step that held the task, which spares a forward pass, and `reset_every` counts
steps. In the code L_i is `last_K`, L_i(0) is `first_K`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mft.errors import ranged
from mft.loss.adaptive import Adaptive


@dataclass
class Lbtw(Adaptive):
    """Weights from the part of its first loss that a task still has; a task not seen yet has the ratio 1."""

    public_name: ClassVar[str] = "lbtw"
    arrays: ClassVar[tuple[str, ...]] = ("first", "last")

    alpha: float = ranged(0.5, min=0)
    """Exponent of loss now / loss at the start; 0.5 in the paper, 0 makes all weights equal."""
    reset_every: int = ranged(0, min=0)
    """Optimizer steps after which the loss at the start is taken anew; 0: never."""

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        self.first_K, self.last_K = np.full((2, len(self.names)), np.nan)

    def wants_train(self, step: int) -> bool:
        return True

    def learn_train(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        values = self.logged()
        if self.reset_every and step > 1 and (step - 1) % self.reset_every == 0:
            self.first_K = np.full(len(self.names), np.nan)
        self.first_K = np.where(np.isnan(self.first_K), loss_K, self.first_K)
        self.last_K = np.where(np.isnan(loss_K), self.last_K, loss_K)
        ratio_K = np.nan_to_num(self.last_K / np.where(self.first_K > 0, self.first_K, np.nan), nan=1.0)
        # A floor: a task whose loss reached exactly 0 must keep a place in a step that holds no other task.
        self.weigh(np.maximum(ratio_K, 1e-12) ** self.alpha)
        return values
