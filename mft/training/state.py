"""The progress of a run; saved with every checkpoint as state/loop.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from mft.batch import StepBatches, StepCounts
from mft.training.best import BestTracker

T = TypeVar("T", BestTracker, "State")


@dataclass
class State:
    """Plain values only: the loop changes them, a checkpoint holds them, a resume takes them up."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """The epoch whose rows are being trained, from 0."""
    rows_consumed: int = 0
    """Rows of this epoch's order that are done."""
    epochs_done: float = 0.0
    """Epochs done, with fraction."""
    skipped: int = 0
    """Steps that were not applied because their loss or gradient was not finite."""
    tokens: int = 0
    """Tokens of the steps done, without padding, over all ranks; a checkpoint of an earlier version counts as
    0."""
    positions: int = 0
    """The same with padding."""
    trained: int = 0
    """Those of them that carry loss."""
    unmeasured: list[int] = field(default_factory=lambda: [0, 0])
    """Steps, and their tokens, that a version took which did not count the two, nor the time by phase."""
    seconds: float = 0.0
    """What these steps took since the start of each process, without what a kill undid."""
    stalled_of: int = 0
    """The length in steps of the run that early stopping ended at this step, 0: it has not."""
    best: BestTracker = field(default_factory=BestTracker)
    learned: dict[str, float] = field(default_factory=dict)
    """What the loss mode has reported since the last logged row."""
    meter: list[dict[str, Any]] = field(default_factory=list)
    """What each rank has summed since the last logged row (`Meter.state`)."""
    costs: list[dict[str, Any]] = field(default_factory=list)
    """Time and memory of each rank by phase (`Phases.state`)."""

    def advance(self, data: StepBatches, counts: StepCounts) -> None:
        """Counts a step as done. counts: of all ranks."""
        self.step += 1
        self.tokens += int(counts.processed)
        self.positions += int(counts.positions)
        self.trained += int(counts.trained)
        self.epoch, self.rows_consumed, self.epochs_done = data.epoch, data.rows_consumed, data.epochs_done

    def as_dict(self) -> dict[str, Any]:
        """Returns what loop.json holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> State:
        """Inverse of `as_dict`; a field that an earlier version did not write has its default.

        Raises ValueError for values of another shape, and where it is not said where the run stands.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__} where an object is expected")
        for name in ("step", "epoch", "rows_consumed", "epochs_done"):
            if name not in values:
                raise ValueError(f"{name} is missing")
        best = _filled(BestTracker(), values.get("best", {}), "best.")
        return _filled(cls(), values | {"best": best}, "")


def _filled(target: T, values: object, path: str) -> T:
    """Sets the fields of `target` to the values, which must have the types of the fields' defaults."""
    if not isinstance(values, dict):
        raise ValueError(f"{path.rstrip('.')} is {values!r}")
    for name, default in vars(target).items():
        value = values.get(name, default)
        # json writes 1.0 and 1 alike; every other field has exactly the type of its default
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool):  # to Python, True is an int
            raise ValueError(f"{path}{name} is {value!r}")
        setattr(target, name, value)
    return target
