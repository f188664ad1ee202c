"""Which validations were the best, and which of them have a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class BestTracker:
    """Counts validations that improve and that stall. Plain values: it is saved with every checkpoint.

    All losses are in nats per token; a *value* is what `mft.objective.criterion` makes of the losses of one
    validation (train.best), smaller is better.
    """

    first: dict[str, float] = field(default_factory=dict)
    """Losses of the first validation, by task."""
    last: dict[str, float] = field(default_factory=dict)
    """Losses of the newest validation."""
    last_step: int = 0
    last_value: float = math.inf
    losses: dict[str, float] = field(default_factory=dict)
    """Losses of the best validation."""
    step: int = 0
    """Step of the best validation."""
    value: float = math.inf
    stalled: int = 0
    """Validations since the best one."""
    saved_step: int = 0
    """The best one among the steps that have a checkpoint, 0: none."""
    saved_value: float = math.inf
    task_loss: dict[str, float] = field(default_factory=dict)
    """The best loss of each task for itself, and at which step."""
    task_step: dict[str, int] = field(default_factory=dict)
    task_saved_loss: dict[str, float] = field(default_factory=dict)
    """The same among the steps that have a checkpoint."""
    task_saved_step: dict[str, int] = field(default_factory=dict)

    def update(self, step: int, losses: Mapping[str, float], value: float) -> bool:
        """Takes a validation; returns whether it is the best so far."""
        self.first = self.first or dict(losses)
        self.last, self.last_step, self.last_value = dict(losses), step, value
        for name, loss in losses.items():
            if loss < self.task_loss.get(name, math.inf):
                self.task_loss[name], self.task_step[name] = loss, step
        # strictly: a plateau stalls, and NaN and inf never improve
        if value < self.value:
            self.losses, self.step, self.value, self.stalled = dict(losses), step, value, 0
            return True
        self.stalled += 1
        return False

    def is_a_tasks_best(self, step: int) -> bool:
        """Whether a task has its best loss so far at this step."""
        return step in self.task_step.values()

    def mark_saved(self, step: int) -> None:
        """Notes that a checkpoint of this step is being written; it counts only if the step was validated."""
        # saved_* rather than the best of all: what matters afterwards is which weights can still be had
        if self.last_step != step or not self.last:
            return
        if self.last_value < self.saved_value:
            self.saved_value, self.saved_step = self.last_value, step
        for name, loss in self.last.items():
            if loss < self.task_saved_loss.get(name, math.inf):
                self.task_saved_loss[name], self.task_saved_step[name] = loss, step
