"""Learning-rate schedules: functions of the step; nothing to save, nothing to multiply by the world size."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from mft.errors import UserError, check_ranges, ranged

FLOOR = 0.1
"""The default `min_lr` as a part of the peak."""


class Schedule(ABC):
    """What the loop asks before each optimizer step. Subclasses are dataclasses of plain values."""

    @abstractmethod
    def lr(self, step: int, total: int, base_lr: float) -> float:
        """Returns the learning rate of optimizer step `step` of 1..`total`; base_lr: the peak."""


class Warmup(Schedule):
    """A linear warm-up from 0 to the peak; subclasses have the field `warmup`."""

    warmup: float

    def __post_init__(self) -> None:
        """Raises UserError for a number out of its range, and for `warmup` between whole numbers of steps."""
        check_ranges(self, "scheduler")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            allowed = "a fraction of all steps below 1, or a whole number of steps"
            raise UserError(f"scheduler.warmup={self.warmup} must be {allowed}.")

    def peak_step(self, total: int) -> int:
        """Returns the first step with the peak: `warmup` of `total` if below 1, else `warmup`; at least 1.

        So that without a warm-up step 1 has the peak, and no step trains with a learning rate of 0.
        """
        return max(1, round(self.warmup * total) if self.warmup < 1 else int(self.warmup))


@dataclass
class Constant(Warmup):
    """The peak in every step after an optional linear warm-up."""

    public_name: ClassVar[str] = "constant"

    warmup: float = ranged(0.0, min=0)
    """Warm-up from 0 to the peak: a fraction of all steps below 1, else a number of steps; 0: none."""

    def lr(self, step: int, total: int, base_lr: float) -> float:
        return base_lr * min(1.0, step / self.peak_step(total))


@dataclass
class Decay(Warmup):
    """A linear warm-up to the peak, then a fall along the subclass's curve; the last step has `min_lr`."""

    warmup: float = ranged(0.03, min=0)
    """Warm-up from 0 to the peak: a fraction of all steps below 1, else a number of steps; 0: none."""
    min_lr: float | None = ranged(None, min=0)
    """Learning rate at the last step; null: a tenth of optimizer.lr, so that it follows a sweep."""

    @abstractmethod
    def curve(self, progress: float) -> float:
        """Returns the part of the way from `min_lr` (0) to the peak (1); progress runs from 0 to 1."""

    def lowest(self, base_lr: float) -> float:
        """Returns `min_lr`, by default a tenth of the peak; raises UserError when it is above the peak."""
        if self.min_lr is None:
            return FLOOR * base_lr
        if self.min_lr > base_lr:
            problem = (
                f"scheduler.min_lr is {self.min_lr:g}, above the learning rate {base_lr:g} (optimizer.lr)"
            )
            raise UserError(f"{problem}; lower it, or set it to null for a tenth of the learning rate")
        return self.min_lr

    def lr(self, step: int, total: int, base_lr: float) -> float:
        lowest = self.lowest(base_lr)  # also judged in the warm-up: a mistake ends the run at its first step
        peak = self.peak_step(total)
        if step <= peak:
            return base_lr * (step / peak)
        if step >= total:  # also where the warm-up is as long as the run: nothing is divided by 0 below
            return lowest
        return lowest + (base_lr - lowest) * self.curve((step - peak) / (total - peak))


@dataclass
class Linear(Decay):
    """A straight line."""

    public_name: ClassVar[str] = "linear"

    def curve(self, progress: float) -> float:
        return 1 - progress


@dataclass
class Cosine(Decay):
    """Half a cosine."""

    public_name: ClassVar[str] = "cosine"

    def curve(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))  # Loshchilov and Hutter 2017, Eq. 5


@dataclass
class CosineRestarts(Decay):
    """`cycles` half cosines of equal length, each from the peak."""

    public_name: ClassVar[str] = "cosine_with_restarts"

    cycles: int = ranged(2, min=1)
    """Number of half cosines; 1 is `Cosine`."""

    def curve(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * (self.cycles * progress % 1.0)))


@dataclass
class Polynomial(Decay):
    """(1 - progress) ^ power."""

    public_name: ClassVar[str] = "polynomial"

    power: float = ranged(2.0, above=0)
    """1: linear; 2: falls fast at first and ends flat; below 1: stays high and falls at the end."""

    def curve(self, progress: float) -> float:
        return (1 - progress) ** self.power
