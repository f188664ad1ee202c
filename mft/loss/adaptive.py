"""What the adaptive modes share: weights that move, a memory of probes, straight-line fits and a small Adam.

All of it is float64 on the CPU and fed only with sums over all ranks, so every rank holds the same weights
without exchanging them.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from mft.errors import UserError, nearest
from mft.loss.means import TaskTokenMean

if TYPE_CHECKING:
    import torch

FLAT = 1e-12
"""A fitted rise over the window below this part of the values is rounding, not a trend."""

Choice = TypeVar("Choice", bound=enum.Enum)


def chosen(kind: type[Choice], value: object, key: str) -> Choice:
    """Returns the member of `kind` that `value` is or names; raises UserError with the allowed values."""
    if isinstance(value, kind):
        return value
    for member in kind:
        if value in (member.value, member.name):
            return member
    allowed = [member.value for member in kind]
    raise UserError(f"{key} is {value!r}; it must be one of {', '.join(allowed)}{nearest(value, allowed)}")


def softmax(values: np.ndarray) -> np.ndarray:
    powers: np.ndarray = np.exp(values - np.max(values))
    shares: np.ndarray = powers / powers.sum()
    return shares


def line_slope(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the least-squares slope of y over x; NaN with fewer than two points, 0 for a rise within
    rounding.

    Both are centred first: the normal equations of absolute step numbers lose half of the slope in float32 at
    step 100,000.
    """
    if len(x) < 2:
        return float("nan")
    x = x - x.mean()
    slope = float(x @ (y - y.mean()) / (x @ x))
    return 0.0 if abs(slope) * (x[-1] - x[0]) <= FLAT * np.abs(y).max() else slope


class History:
    """The last `length` probes: at which number of updates, and one value per column (NaN = not measured)."""

    def __init__(self, length: int | None = None):
        self.length = length
        self.update_n: list[int] = []
        self.row_n: list[np.ndarray] = []

    def append(self, update: int, row: np.ndarray) -> None:
        self.update_n.append(update)
        self.row_n.append(np.asarray(row, dtype=np.float64))
        if self.length is not None:
            del self.update_n[: -self.length], self.row_n[: -self.length]

    def __len__(self) -> int:
        return len(self.row_n)

    def array(self) -> np.ndarray:
        """Returns float64 [n, columns]."""
        return np.stack(self.row_n)

    def slopes(self) -> np.ndarray:
        """Returns float64 [columns]: slope per optimizer step over the values measured, NaN with fewer than
        two."""
        x, table = np.asarray(self.update_n, dtype=np.float64), self.array()
        there = np.isfinite(table)
        return np.array([line_slope(x[there[:, i]], table[there[:, i], i]) for i in range(table.shape[1])])

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """names: of the columns."""
        columns = zip(names, self.array().T.tolist() if self.row_n else [[] for _ in names], strict=True)
        return {"updates": list(self.update_n), "columns": dict(columns)}

    def load_state_dict(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        self.update_n = [int(update) for update in state["updates"]]
        columns = [remembered(state["columns"], name) for name in names]
        self.row_n = list(np.array(columns, dtype=np.float64).T)


class Adam:
    """Adam on K numbers, weight decay added to the gradient as in `torch.optim.Adam`; absent tasks are left
    alone."""

    def __init__(self, tasks: int, lr: float, weight_decay: float = 0.0):
        self.lr, self.weight_decay = lr, weight_decay
        self.mean_K, self.square_K, self.steps_K = np.zeros(tasks), np.zeros(tasks), np.zeros(tasks)

    def stepped(self, value_K: np.ndarray, gradient_K: np.ndarray, present_K: np.ndarray) -> np.ndarray:
        """Returns the values after one step for the tasks in `present_K`; betas 0.9 and 0.999, eps 1e-8."""
        gradient_K = gradient_K + self.weight_decay * value_K
        steps_K = self.steps_K + 1
        mean_K = 0.9 * self.mean_K + 0.1 * gradient_K
        square_K = 0.999 * self.square_K + 0.001 * gradient_K**2
        move_K = self.lr * (mean_K / (1 - 0.9**steps_K)) / (np.sqrt(square_K / (1 - 0.999**steps_K)) + 1e-8)
        self.mean_K = np.where(present_K, mean_K, self.mean_K)
        self.square_K = np.where(present_K, square_K, self.square_K)
        self.steps_K = np.where(present_K, steps_K, self.steps_K)
        return np.where(present_K, value_K - move_K, value_K)

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        return by_task(names, mean=self.mean_K, square=self.square_K, steps=self.steps_K)

    def load_state_dict(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        self.mean_K, self.square_K, self.steps_K = arrays(state, names, "mean", "square", "steps")


def by_task(names: Sequence[str], **arrays_K: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns {entry: {task: value}}: the names say whose memory it is, so that the order of the tasks does
    not."""
    return {entry: dict(zip(names, array_K.tolist(), strict=True)) for entry, array_K in arrays_K.items()}


def arrays(state: Mapping[str, Any], names: Sequence[str], *entries: str) -> list[np.ndarray]:
    """Inverse of `by_task`: float64 [K] of each entry, in the order of `names`. Raises UserError, see
    `remembered`."""
    return [
        np.array([remembered(state[entry], name) for name in names], dtype=np.float64) for entry in entries
    ]


def remembered(values: Mapping[str, Any], name: str) -> Any:
    """Returns the value of a task; raises UserError where the checkpoint's loss knows no task of this
    name."""
    if name not in values:
        raise UserError(f"the checkpoint's loss remembers the tasks {', '.join(values)}, but not {name}")
    return values[name]


def measured(loss_K: torch.Tensor, dropped_K: np.ndarray) -> np.ndarray:
    """Returns the losses as float64 numpy, NaN where not finite; infinite ones (measured, not finite: see
    `task_means`) are counted in `dropped_K`."""
    row_K = loss_K.detach().double().cpu().numpy().copy()
    dropped_K += np.isinf(row_K)
    row_K[~np.isfinite(row_K)] = np.nan
    return row_K


def check_probing(mode: str, warmup_steps: int, history_length: int, update_interval: int) -> None:
    """Raises UserError unless W % u == 0, W >= 3u and N >= W / u (W warm-up, u interval, N history
    length)."""
    w, n, u = warmup_steps, history_length, update_interval
    if w < 3 * u:
        raise UserError(
            f"loss.warmup_steps is {w}; {mode} needs at least 3 x loss.update_interval = {3 * u} "
            "(two probes make a line)"
        )
    if w % u:
        raise UserError(
            f"loss.warmup_steps is {w}, not a multiple of loss.update_interval = {u}; set "
            f"loss.warmup_steps to {w - w % u if w - w % u >= 3 * u else w + u - w % u} or {w + u - w % u}"
        )
    if n < w // u:
        raise UserError(
            f"loss.history_length is {n} probes; {mode} needs at least loss.warmup_steps / "
            f"loss.update_interval = {w // u}: raise loss.history_length or lower loss.warmup_steps"
        )


def check_probes(mode: str, names: Sequence[str], valid_samples: Sequence[int]) -> None:
    """Raises UserError when no task has a validation sample to probe; warns of the tasks that have none."""
    without = [name for name, count in zip(names, valid_samples, strict=True) if not count]
    if len(without) == len(names):
        raise UserError(
            f"loss={mode} learns its weights from validation samples, and no task has any; give data.split a "
            "validation part, e.g. data.split=[95,5,0]"
        )
    if without:
        warnings.warn(
            f"loss={mode} cannot judge tasks without validation samples: {', '.join(without)}", stacklevel=2
        )


def warn_of_a_short_run(mode: str, steps: int, still: int, key: str, value: int, largest: int) -> None:
    """Warns when the weights hold still in all of the run's steps; still: steps before the first with new
    weights."""
    if steps <= still:
        advice = f"set {key} to {largest} or less" if largest >= 1 else "train longer"
        warnings.warn(
            f"loss={mode} will not move its weights: {key} is {value} and the run has {steps} steps; "
            f"{advice}",
            stacklevel=2,
        )


@dataclass
class Adaptive(TaskTokenMean):
    """task_token_mean with weights that move during training; the static weights hold until the mode has its
    own."""

    public_name: ClassVar[str] = ""

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        self.dropped_K = np.zeros(len(self.names))
        if float(self.weight_K.sum()) > 0:
            self.weigh(self.weight_K.numpy())

    def weigh(self, weight_K: np.ndarray) -> None:
        """Sets the weights of the coming steps, scaled to sum to 1."""
        import torch

        self.weight_K = torch.from_numpy(np.asarray(weight_K, dtype=np.float64) / np.sum(weight_K))

    def learn(
        self,
        step: int,
        valid_K: torch.Tensor | None = None,
        train_K: torch.Tensor | None = None,
        repeat_K: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """Hands the losses that came to `learn_valid`, `learn_train`, `learn_repeat`, in this order; a mode
        overrides those it learns from. They get float64 numpy [K], NaN where a task is absent or its loss is
        not finite (which is counted as dropped), and return values to log.
        """
        values: dict[str, float] = {}
        hooks = ((self.learn_valid, valid_K), (self.learn_train, train_K), (self.learn_repeat, repeat_K))
        for hook, loss_K in hooks:
            if loss_K is not None:
                values |= hook(step, measured(loss_K, self.dropped_K))
        return values

    def learn_valid(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        """Learns from a probe before step `step`: the losses after step - 1 updates."""
        return {}

    def learn_train(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        """Learns from the losses of step `step`'s micro-batches, as they were before its update."""
        return {}

    def learn_repeat(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        """Learns from the losses of the same micro-batches after the update."""
        return {}

    def logged(self, **series_K: np.ndarray) -> dict[str, float]:
        """Returns `train/weight/<task>` and `<mode>/<name>/<task>` for each series given (NaN entries left
        out)."""
        pairs = zip(self.names, self.weight_K.tolist(), strict=True)
        values = {f"train/weight/{name}": weight for name, weight in pairs}
        if self.dropped_K.any():
            series_K["dropped"] = self.dropped_K
        for series, value_K in series_K.items():
            pairs = zip(self.names, value_K.tolist(), strict=True)
            values |= {f"{self.mode}/{series}/{name}": value for name, value in pairs if value == value}
        return values

    @property
    def mode(self) -> str:
        """The first part of the names of what this mode logs."""
        return self.public_name or type(self).__name__.lower()

    def state_dict(self) -> dict[str, Any]:
        return by_task(self.names, weight=self.weight_K.numpy(), dropped=self.dropped_K)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        import torch

        weight_K, self.dropped_K = arrays(state, self.names, "weight", "dropped")
        self.weight_K = torch.from_numpy(weight_K)
