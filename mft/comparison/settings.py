"""Settings: runs that differ by their seed alone, and what each of them reached.

A run is judged by one of its validations: the best one by the metric that ranks. Every other validation loss
is read there, too, so that the numbers of a line belong to one model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev

from mft.comparison.rows import Weighted, of_run
from mft.objective import criterion
from mft.runs.results import Run

SEED = "train.seed"

Block = tuple[str, ...]
"""What pairs the runs of two settings: the seed, and whatever else differs that makes no setting."""


@dataclass(frozen=True)
class Metric:
    """What runs are compared by."""

    name: str
    """mean, worst or weighted (of the tasks' validation losses), a task, or the name of a logged metric."""
    higher: bool = False
    """Whether the highest value is the best one."""

    @property
    def sign(self) -> int:
        """1 where lower values are better, else -1: values times it are sorted best first."""
        return -1 if self.higher else 1


@dataclass
class Judged:
    """One run, as the metric that ranks chose its validation. tasks: those mean and worst are taken over."""

    run: Run
    metric: Metric
    tasks: Sequence[str]

    @cached_property
    def losses(self) -> dict[int, dict[str, float]]:
        """The validation losses by step and task, of validations that have all tasks."""
        found = {}
        for row in self.run.rows:
            of_row = {task: row.get(f"valid/loss/{task}") for task in self.run.tasks}
            numbers = {task: float(loss) for task, loss in of_row.items() if loss is not None}
            # NaN is smaller than nothing and larger than nothing: the worst task would be any other one
            losses = {task: loss for task, loss in numbers.items() if not math.isnan(loss)}
            if losses and losses.keys() >= set(self.tasks):
                found[int(row["step"])] = losses
        return found

    @cached_property
    def step(self) -> int | None:
        """The validation the run is judged by, None without any."""
        by = self.metric if self.is_loss(self.metric.name) else Metric("mean")
        return self._best(self.series(by.name), by)

    def is_loss(self, name: str) -> bool:
        """Whether a metric is a validation loss, which is read at the step that was chosen."""
        return name in ("mean", "worst") or name in self.run.tasks or name.startswith("valid/")

    def series(self, name: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a metric, without values that are not finite."""
        if name not in ("mean", "worst"):
            return self.run.series(name)
        parts = [(step, {task: of[task] for task in self.tasks}) for step, of in self.losses.items()]
        points = [(step, criterion(part, name, {})) for step, part in parts if part]
        return [(step, value) for step, value in points if math.isfinite(value)]

    def value(self, metric: Metric) -> float | None:
        """Returns what the run reached, None where it was not logged.

        A validation loss: at the chosen step. Another metric: its best value, or its last where it is logged
        once, when the run ends (test/…, best/…, total/…).
        """
        series = self.series(metric.name)
        if not series:
            return None
        if metric.name.startswith(("test/", "best/", "total/")):
            return series[-1][1]
        if self.is_loss(metric.name):
            return next((value for step, value in series if step == self.step), None)
        step = self._best(series, metric)
        return next(value for at, value in series if at == step)

    def weights(self, metric: Metric) -> dict[str, float] | None:
        """Returns each task's part in the metric at the chosen step; None where it is no mean of them."""
        if metric.name in self.run.tasks:
            return {metric.name: 1.0}
        losses = self.losses.get(self.step) if self.step is not None else None
        if losses is None or not self.tasks or metric.name not in ("mean", "worst"):
            return None
        if metric.name == "mean":
            return dict.fromkeys(self.tasks, 1 / len(self.tasks))
        return {max(self.tasks, key=lambda task: losses[task]): 1.0}

    @staticmethod
    def _best(series: Sequence[tuple[int, float]], metric: Metric) -> int | None:
        # of equal values the first: what a run that keeps its best checkpoint has kept
        return min(series, key=lambda point: metric.sign * point[1])[0] if series else None


@dataclass
class Setting:
    """Runs that differ by their seed alone."""

    keys: dict[str, str]
    """The values that tell it from the other settings."""

    blocks: dict[Block, list[Judged]]
    """Its runs by what pairs them with those of other settings; several where a seed was run again."""

    label: str = ""
    """Its short name, for legends and axes."""

    _values: dict[tuple[Metric, Block], float | None] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The keys in one line."""
        return " ".join(f"{key}={value}" for key, value in self.keys.items()) or "(all as given)"

    @property
    def runs(self) -> list[Run]:
        """All its runs."""
        return [judged.run for judged in self.judged]

    @property
    def judged(self) -> list[Judged]:
        """All its runs, as they are judged."""
        return [judged for of_block in self.blocks.values() for judged in of_block]

    def value(self, block: Block, metric: Metric) -> float | None:
        """Returns the value of a seed; the mean where it was run several times."""
        if (metric, block) not in self._values:
            values = [judged.value(metric) for judged in self.blocks.get(block, ())]
            known = [value for value in values if value is not None]
            self._values[metric, block] = fmean(known) if known else None
        return self._values[metric, block]

    def values(self, metric: Metric) -> dict[Block, float]:
        """Returns the values of all seeds that have one."""
        found = {block: self.value(block, metric) for block in self.blocks}
        return {block: value for block, value in found.items() if value is not None}

    def mean(self, metric: Metric) -> float:
        """Returns the mean over seeds, NaN without any."""
        return fmean(values) if (values := self.values(metric).values()) else math.nan

    def test(self) -> dict[str, float]:
        """Returns the losses on test rows by task, means over the runs that measured them.

        They are of the checkpoint that the run itself chose on its validations (train.best).
        """
        tested: dict[str, list[float]] = {}
        for run in self.runs:
            for task, loss in run.test.items():
                tested.setdefault(task, []).append(loss)
        return {task: fmean(losses) for task, losses in tested.items()}

    def rows(self, block: Block, metric: Metric) -> Weighted | None:
        """Returns the part of each task in a seed's value, and the losses of its validation rows.

        None where the value is no mean of tasks, the seed was run several times, or its rows are not known.
        """
        judged = self.blocks[block][0]
        weights = judged.weights(metric)
        if len(self.blocks[block]) > 1 or weights is None or judged.step is None or judged.run.folder is None:
            return None
        return weights, of_run(judged.run.folder, "valid", judged.step)

    def spread(self, metric: Metric) -> float | None:
        """Returns the standard deviation between seeds, None below two."""
        values = list(self.values(metric).values())
        return stdev(values) if len(values) > 1 else None

    def cost(self, name: str) -> float | None:
        """Returns the mean of a run's seconds, memory, tokens or flops, None where no run recorded it.

        Runs that did not finish have taken less: they count only where no run finished.
        """
        runs = [run for run in self.runs if run.state == "finished"] or self.runs
        values = [value for run in runs if (value := getattr(run, name)) is not None]
        return fmean(values) if values else None


def settings_of(
    runs: Sequence[Run], keys: Sequence[str], pairing: Sequence[str], metric: Metric, tasks: Sequence[str]
) -> list[Setting]:
    """Returns the settings, the best mean first, those without any value last.

    keys: whose values make a setting; pairing: those whose values pair runs of different settings.
    """
    settings: dict[Block, Setting] = {}
    for run in runs:
        own, block = (tuple(run.values.get(key, "-") for key in names) for names in (keys, pairing))
        setting = settings.setdefault(own, Setting(dict(zip(keys, own, strict=True)), {}))
        setting.blocks.setdefault(block, []).append(Judged(run, metric, tasks))
    means = {id(setting): setting.mean(metric) for setting in settings.values()}

    def order(setting: Setting) -> tuple[bool, float]:
        return math.isnan(means[id(setting)]), metric.sign * means[id(setting)]

    return sorted(settings.values(), key=order)
