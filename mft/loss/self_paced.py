"""Self-paced task weights: the older adaptive mode of MFTCoder (removed there after v0.3).

A probe gives each task's validation loss. With alpha_i its slope over the last N probes and K tasks,

    a_i = K alpha_i / sum_j |alpha_j|,   q_i = -a_i softmax(a)_i,   w = softmax(s q)

so a task whose loss rises (a > 0) gets a weight near 0, and among falling ones the score is highest at
a = -1. There is no floor: weights below 1e-5 are usual. Unlike the original, fits use real step numbers and
float64 (its float32 fit is 50 % off at step 100,000), an absent task is not a zero, and the history is part
of the checkpoint. In the code alpha is `slope_K`, q the argument of the last softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mft.errors import ranged
from mft.loss.adaptive import Probing
from mft.loss.task_history import History, softmax


def self_paced_weights(slope_K: np.ndarray, scale: float) -> np.ndarray:
    """Returns float64 [K] weights that sum to 1; uniform when every slope is 0. NaN (unknown) counts as 0."""
    slope_K = np.nan_to_num(slope_K, nan=0.0)
    total = np.abs(slope_K).sum()
    if total == 0:
        return np.full(len(slope_K), 1 / len(slope_K))
    # the softmax is over tasks of the whole run; an unknown slope counts as flat, not as absent
    a_K = len(slope_K) * slope_K / total
    return softmax(scale * -a_K * softmax(a_K))


@dataclass
class SelfPaced(Probing):
    """Weights from the slopes of the validation losses."""

    public_name: ClassVar[str] = "self_paced"
    parts: ClassVar[tuple[str, ...]] = ("history",)

    scale: float = ranged(50.0, min=0)
    """Sharpness s of w = softmax(s q); 50 in the original, 10 is mild, 0 makes all weights equal."""
    warmup_steps: int = ranged(100, min=1)
    """Optimizer steps W before the weights move; a multiple of update_interval and at least 3 of them."""
    history_length: int = ranged(100, min=1)
    """Probes N a slope is fitted over; at least W / update_interval."""
    update_interval: int = ranged(1, min=1)
    """Optimizer steps u from one probe to the next."""
    probe_samples: int = ranged(2, min=1)
    """Validation samples of each task that one probe reads, over all ranks; more is less noisy and dearer."""

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        self.history = History(self.names, self.history_length)

    def learn_valid(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        self.history.append(step - 1, loss_K)
        if not self.warm(step - 1):
            return self.logged()
        slope_K = self.history.slopes()
        self.weigh(self_paced_weights(slope_K, self.scale))
        return self.logged(slope=slope_K)
