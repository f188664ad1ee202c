"""What an adaptive mode remembers of its tasks: a history of probes with straight-line fits, an Adam, and how
a checkpoint holds them.

Shapes: `x_K` one value for each of the K tasks, `x_p` one for each probe remembered, oldest first; a probe is
a small validation. All of it is float64 numpy on the CPU and fed only with sums over all ranks, so that every
rank holds the same weights without exchanging them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mft.errors import UserError

FLAT = 1e-12
"""A fitted rise over the window below this part of the values is rounding, not a trend."""


def softmax(values: np.ndarray) -> np.ndarray:
    # exp(x - max) cannot overflow, and the factor exp(-max) cancels
    powers: np.ndarray = np.exp(values - np.max(values))
    return np.asarray(powers / powers.sum())


def line_slope(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the least-squares slope of y over x; NaN below two points, 0 for a rise within rounding.

    slope = sum (x - mean x)(y - mean y) / sum (x - mean x)^2
    """
    if len(x) < 2:
        return float("nan")
    # Centred first: the normal equations of absolute step numbers, as in the original code, lose half of the
    # slope in float32 at step 100,000.
    x = x - x.mean()
    slope = float(x @ (y - y.mean()) / (x @ x))
    return 0.0 if abs(slope) * (x[-1] - x[0]) <= FLAT * np.abs(y).max() else slope


class History:
    """The last `length` probes: the updates before each, and a value per column (NaN = not measured)."""

    def __init__(self, columns: Sequence[str], length: int | None = None):
        self.columns, self.length = columns, length
        self.update_p: list[int] = []
        self.values_p: list[np.ndarray] = []

    def append(self, update: int, values: np.ndarray) -> None:
        self.update_p.append(update)
        self.values_p.append(np.asarray(values, dtype=np.float64))
        if self.length is not None:
            del self.update_p[: -self.length], self.values_p[: -self.length]

    def array(self) -> np.ndarray:
        """Returns float64 [probes, columns]."""
        return np.stack(self.values_p)

    def slopes(self) -> np.ndarray:
        """Returns float64 [columns]: slope per optimizer step over the measured values, NaN below two."""
        update_p = np.asarray(self.update_p, dtype=np.float64)
        slopes = []
        for value_p in self.array().T:
            # an absent task has no value at a probe; leaving the point out keeps the slope of the others
            measured_p = np.isfinite(value_p)
            slopes.append(line_slope(update_p[measured_p], value_p[measured_p]))
        return np.array(slopes)

    def state_dict(self) -> dict[str, Any]:
        values = self.array().T.tolist() if self.values_p else [[] for _ in self.columns]
        return {"updates": list(self.update_p), "columns": dict(zip(self.columns, values, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.update_p = [int(update) for update in state["updates"]]
        self.values_p = list(in_order(state["columns"], self.columns).T)


class Adam:
    """Adam (Kingma and Ba 2015) on K numbers; absent tasks are left alone.

    Betas 0.9 and 0.999, eps 1e-8, weight decay added to the gradient, as in `torch.optim.Adam`. Written out,
    because each task has its own step count: a task that was absent must not have its mean decayed.
    """

    def __init__(self, names: Sequence[str], lr: float, weight_decay: float = 0.0):
        self.names, self.lr, self.weight_decay = names, lr, weight_decay
        self.mean_K, self.square_K, self.steps_K = np.zeros((3, len(names)))

    def stepped(self, value_K: np.ndarray, gradient_K: np.ndarray, present_K: np.ndarray) -> np.ndarray:
        """Returns the values after one step for the tasks in `present_K`."""
        gradient_K = gradient_K + self.weight_decay * value_K
        steps_K = self.steps_K + 1
        mean_K = 0.9 * self.mean_K + 0.1 * gradient_K
        square_K = 0.999 * self.square_K + 0.001 * gradient_K**2
        move_K = self.lr * (mean_K / (1 - 0.9**steps_K)) / (np.sqrt(square_K / (1 - 0.999**steps_K)) + 1e-8)
        self.mean_K = np.where(present_K, mean_K, self.mean_K)
        self.square_K = np.where(present_K, square_K, self.square_K)
        self.steps_K = np.where(present_K, steps_K, self.steps_K)
        return np.where(present_K, value_K - move_K, value_K)

    def state_dict(self) -> dict[str, Any]:
        return by_task(self.names, mean=self.mean_K, square=self.square_K, steps=self.steps_K)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for entry in ("mean", "square", "steps"):
            setattr(self, f"{entry}_K", in_order(state[entry], self.names))


def by_task(names: Sequence[str], **arrays_K: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns {entry: {task: value}}, in which a resumed run may list its tasks in another order."""
    return {entry: dict(zip(names, array_K.tolist(), strict=True)) for entry, array_K in arrays_K.items()}


def in_order(values: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """Returns the values of one entry of `by_task` in the order of `names`: float64 [K], or [K, n] of lists.

    Raises UserError for a task that the checkpoint does not have.
    """
    for name in names:
        if name not in values:
            raise UserError(f"the checkpoint's loss remembers the tasks {', '.join(values)}, but not {name}")
    return np.array([values[name] for name in names], dtype=np.float64)
