"""What adaptive modes have in common: weights that change, and the losses that they learn from.

Shapes: `x_K` one value for each of the K tasks. What a mode remembers is in `task_history`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mft.errors import UserError, check_ranges
from mft.loss.means import TaskTokenMean
from mft.loss.task_history import by_task, in_order

if TYPE_CHECKING:
    import torch


@dataclass
class Adaptive(TaskTokenMean):
    """task_token_mean with weights that move during training; until then the static weights hold."""

    public_name: ClassVar[str] = ""
    arrays: ClassVar[tuple[str, ...]] = ()
    """What a checkpoint keeps of the mode besides its weights: `x` for the array `x_K`."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Attributes that a checkpoint keeps: a `History` or an `Adam`."""

    def __post_init__(self) -> None:
        check_ranges(self, "loss")

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
        """Hands the losses that came to `learn_valid`, `learn_train`, `learn_repeat`, in this order.

        A mode overrides those it learns from. They get float64 numpy [K], NaN where a task is absent or its
        loss is not finite (see `finite`), and return values to log.
        """
        values: dict[str, float] = {}
        hooks = ((self.learn_valid, valid_K), (self.learn_train, train_K), (self.learn_repeat, repeat_K))
        for hook, loss_K in hooks:
            if loss_K is not None:
                values |= hook(step, self.finite(loss_K))
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

    def finite(self, loss_K: torch.Tensor) -> np.ndarray:
        """Returns the losses as numpy, NaN where not finite; the infinite ones are counted as dropped.

        `training.metrics.task_means` makes NaN mean absent and inf mean measured, but not finite.
        """
        row_K = loss_K.detach().double().cpu().numpy().copy()
        self.dropped_K += np.isinf(row_K)
        row_K[~np.isfinite(row_K)] = np.nan
        return row_K

    def logged(self, **series_K: np.ndarray) -> dict[str, float]:
        """Returns `train/weight/<task>` and `<mode>/<series>/<task>` of each series, without NaN entries."""
        if self.dropped_K.any():
            series_K["dropped"] = self.dropped_K
        names = {"train/weight": self.weight_K.numpy()}
        names |= {f"{self.mode}/{series}": value_K for series, value_K in series_K.items()}
        values = {}
        for prefix, value_K in names.items():
            for name, value in zip(self.names, value_K.tolist(), strict=True):
                if value == value:
                    values[f"{prefix}/{name}"] = value
        return values

    @property
    def mode(self) -> str:
        """The first part of the names of what this mode logs."""
        return self.public_name or type(self).__name__.lower()

    def check_probes(self, valid_samples: Sequence[int]) -> None:
        """Raises UserError when no task has a validation sample; warns of the tasks that have none."""
        without = [name for name, count in zip(self.names, valid_samples, strict=True) if not count]
        if len(without) == len(self.names):
            reason = f"loss={self.mode} learns its weights from validation samples, and no task has any"
            raise UserError(f"{reason}; give data.split a validation part, e.g. data.split=[95,5,0]")
        if without:
            reason = f"loss={self.mode} cannot judge tasks without validation samples"
            warnings.warn(f"{reason}: {', '.join(without)}", stacklevel=2)

    def warn_if_short(self, steps: int, first_step: int, key: str, largest: int) -> None:
        """Warns when the weights would not move in a run of `steps` steps.

        first_step: the first with new weights; key: the field that sets it; largest: its largest value by
        which they would move, below 1 if there is none.
        """
        if steps < first_step:
            reason = f"loss.{key} is {getattr(self, key)} and the run has {steps} steps"
            advice = f"set loss.{key} to {largest} or less" if largest >= 1 else "train longer"
            warnings.warn(f"loss={self.mode} will not move its weights: {reason}; {advice}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, f"{name}_K") for name in self.arrays}
        parts = {name: getattr(self, name).state_dict() for name in self.parts}
        return by_task(self.names, weight=self.weight_K.numpy(), dropped=self.dropped_K, **own) | parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        import torch

        self.weight_K = torch.from_numpy(in_order(state["weight"], self.names))
        for name in ("dropped", *self.arrays):
            setattr(self, f"{name}_K", in_order(state[name], self.names))
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])


class Probing(Adaptive):
    """Learns from the last N probes, one every u = update_interval steps, after W = warmup_steps."""

    warmup_steps: int
    history_length: int
    update_interval: int

    def __post_init__(self) -> None:
        """Raises UserError unless W >= 3u (two probes make a line), u divides W, and N >= W / u."""
        super().__post_init__()
        w, n, u = self.warmup_steps, self.history_length, self.update_interval
        if w < 3 * u:
            least = f"at least 3 x loss.update_interval = {3 * u}"
            raise UserError(f"loss.warmup_steps is {w}; it must be {least}, since two probes make a line")
        if w % u:
            mend = f"set loss.warmup_steps to {w - w % u} or {w + u - w % u}"
            raise UserError(f"loss.warmup_steps is {w}, not a multiple of loss.update_interval = {u}; {mend}")
        if n < w // u:
            least = f"at least loss.warmup_steps / loss.update_interval = {w // u}"
            mend = "raise it, or lower loss.warmup_steps"
            raise UserError(f"loss.history_length is {n} probes; it must be {least}: {mend}")

    @property
    def needs_validation(self) -> bool:
        return True

    def check_schedule(self, steps: int, valid_samples: Sequence[int]) -> None:
        self.check_probes(valid_samples)
        u = self.update_interval
        largest = (steps - 1 + u) // u * u  # the last probe of the run would end this warm-up
        largest = largest if largest >= 3 * u else 0
        self.warn_if_short(steps, self.warmup_steps - u + 1, "warmup_steps", largest)

    def wants_probe(self, step: int) -> bool:
        return (step - 1) % self.update_interval == 0

    def warm(self, update: int) -> bool:
        """Whether the weights move at the probe after so many updates: it is in use until the next one."""
        return update + self.update_interval >= self.warmup_steps
