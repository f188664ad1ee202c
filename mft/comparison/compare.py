"""A comparison: settings ranked by a metric, and each one's difference from a reference.

The reference is a baseline that the person names, the single-task runs, or else the best setting. Which
setting is best is found in the data, so any two settings might have come to be compared: the correction then
counts all pairs of them, not only those with the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from mft.comparison import baseline as baselines
from mft.comparison.differences import differing, shorten_paths
from mft.comparison.direction import directions
from mft.comparison.rows import Weighted, differ, paired_rows
from mft.comparison.settings import SEED, Metric, Setting, settings_of
from mft.comparison.statistics import Difference, corrected, paired
from mft.console.short_names import short_names
from mft.errors import UserError, nearest
from mft.runs.results import Run

DETAILED = 60
"""Settings, the best first, whose differences are taken row by row; the others have their seeds alone."""


@dataclass
class Comparison:
    """What is known of the settings at hand. Lists beside `settings` have an entry for each of them."""

    title: str
    metrics: tuple[Metric, ...]
    """The first one ranks."""
    settings: list[Setting]
    """The best mean first, those without a value last."""
    tasks: list[str]
    """Tasks that every run was validated on, which mean and worst are taken over."""
    other_tasks: dict[str, int]
    """Tasks that only some runs were validated on → how many."""
    pairing: tuple[str, ...]
    """Keys whose values pair the runs of two settings."""
    reference: Setting | None = None
    """What the others are compared with; None where no setting has a value."""
    baseline: str = ""
    """What the reference is called where it is a baseline; "": it is the best setting."""
    differences: list[Difference | None] = field(default_factory=list)
    """From the reference, by the metric that ranks; None for the reference itself and without a value."""
    by_task: list[dict[str, Difference]] = field(default_factory=list)
    """From the reference, on each task, corrected over the tasks of the setting."""
    base: dict[str, dict[str, float]] = field(default_factory=dict)
    """Losses before training, by base model ("" where there is one) and task."""

    @property
    def metric(self) -> Metric:
        """The metric that ranks."""
        return self.metrics[0]

    @property
    def runs(self) -> list[Run]:
        """The runs of all settings, in their order."""
        return [run for setting in self.settings for run in setting.runs]

    @property
    def outside(self) -> Setting | None:
        """The reference where it is none of the settings, as the single-task runs are; else None."""
        within = any(setting is self.reference for setting in self.settings)
        return None if within else self.reference

    @property
    def every_setting(self) -> list[Setting]:
        """All settings, and after them a reference that is none."""
        return [*self.settings, *([self.outside] if self.outside else [])]

    @property
    def every_run(self) -> list[Run]:
        """The runs of `every_setting`."""
        return [run for setting in self.every_setting for run in setting.runs]

    @property
    def paired_over(self) -> str:
        """What the pairs of two settings differ in, in words: seeds, or other keys as well."""
        values = zip(*(block for setting in self.settings for block in setting.blocks), strict=True)
        keys = [key for key, of in zip(self.pairing, values, strict=False) if len(set(of)) > 1]
        return " and ".join("seeds" if key == SEED else key for key in keys or [SEED])

    @property
    def ranked(self) -> list[Setting]:
        """Settings that have a value, the best first."""
        return [setting for setting in self.settings if setting.values(self.metric)]

    @property
    def winner(self) -> Setting | None:
        """The best setting where it is told apart from every other one, else None."""
        ranked = self.ranked
        if len(ranked) < 2 or self.reference is not ranked[0] or self.baseline:
            return None
        # Means are over the seeds of each setting, differences over those in common: the best mean may be
        # that of the worse one.
        others = [self.difference(setting) for setting in ranked[1:]]
        behind = [d is not None and d.told_apart and self.metric.sign * d.estimate > 0 for d in others]
        return ranked[0] if all(behind) else None

    def difference(self, setting: Setting) -> Difference | None:
        """Returns the entry of `differences` for a setting."""
        places = (i for i, own in enumerate(self.settings) if own is setting)
        return next((self.differences[i] for i in places), None)


def compare(
    runs: Sequence[Run],
    title: str,
    metrics: Sequence[str] = ("mean",),
    by: Sequence[str] = (),
    better: str = "",
    baseline: str = "",
) -> Comparison:
    """Returns the comparison of runs.

    metrics: the first ranks; by: the keys that make a setting, () for all that differ but the seed; better:
    see `directions`; baseline: KEY=VALUE,… of a setting, `single`, or ""
    for the best. Raises UserError for a key, a value or a metric that no run has, and where a name does not
    tell.
    """
    shorten_paths(runs)  # before keys become labels of settings
    every_task = list(dict.fromkeys(task for run in runs for task in run.tasks))
    _require_known(runs, metrics, by)
    higher = directions(metrics, every_task, better)
    measured = tuple(Metric(name, higher[name]) for name in dict.fromkeys(metrics))
    single, ranked = baselines.divided(runs, measured[0], baseline)
    tasks, others = common_tasks(ranked, measured[0])
    differ = differing(ranked)
    keys = list(by) or [key for key in differ if key != SEED]
    pairing = tuple(dict.fromkeys([SEED, *(key for key in differ if key not in keys)]))
    settings = settings_of(ranked, keys, pairing, measured[0], tasks)
    for setting, name in zip(settings, short_names([setting.keys for setting in settings]), strict=True):
        setting.label = name
    result = Comparison(title, measured, settings, tasks, others, pairing)
    if single:
        result.reference = baselines.single_tasks(single, tasks, pairing)
        result.baseline = baselines.SINGLE
    elif baseline:
        result.reference = baselines.named(settings, baseline)
        result.baseline = result.reference.title
    else:
        result.reference = next(iter(result.ranked), None)
    _take_differences(result)
    result.base = before_training(runs)
    return result


def common_tasks(runs: Sequence[Run], metric: Metric) -> tuple[list[str], dict[str, int]]:
    """Returns the tasks that all runs were validated on, and the others with their number of runs.

    Where runs are ranked by one task, those without it do not count: they have no value.
    """
    every = list(dict.fromkeys(task for run in runs for task in run.tasks))
    validated = [run for run in runs if run.tasks and (metric.name not in every or metric.name in run.tasks)]
    counts = {task: sum(task in run.tasks for run in validated) for task in every}
    common = [task for task in every if counts[task] == len(validated)]
    return common, {task: count for task, count in counts.items() if task not in common}


def before_training(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Returns the losses of step 0 by task, for each base model, "" where there is only one."""
    of_models: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        first = next((row for row in run.rows if row["step"] == 0), {})
        losses = of_models.setdefault(run.values.get("model.path") or run.values.get("model", ""), {})
        for task in run.tasks:
            value = first.get(f"valid/loss/{task}")
            if value is not None and math.isfinite(value):
                losses.setdefault(task, []).append(value)
    means = {
        model: {task: fmean(of_task) for task, of_task in of.items()} for model, of in of_models.items() if of
    }
    return {"": next(iter(means.values()))} if len(means) == 1 else means


def difference_of(
    setting: Setting, other: Setting, metric: Metric, by_rows: bool = True
) -> Difference | None:
    """Returns a setting minus another one, paired; None where they have no seed in common.

    by_rows: whether the losses of single rows are read as well.
    """
    mine, theirs = setting.values(metric), other.values(metric)
    blocks = [block for block in mine if block in theirs]
    if not blocks:
        return None
    pairs: list[tuple[Weighted, Weighted]] = []
    for block in blocks if by_rows else ():
        sides = setting.rows(block, metric), other.rows(block, metric)
        if sides[0] is None or sides[1] is None:
            pairs.clear()
            break
        pairs.append((sides[0], sides[1]))
    found = paired([mine[block] - theirs[block] for block in blocks], paired_rows(pairs) if pairs else ())
    other_rows, other_tokens = differ(pairs)
    return replace(found, other_rows=other_rows, other_tokens=other_tokens)


def _take_differences(result: Comparison) -> None:
    """Fills in the differences of all settings from the reference."""
    reference = result.reference
    for place, setting in enumerate(result.settings):
        found, of_tasks = None, {}
        if reference is not None and setting is not reference:
            by_rows = place < DETAILED
            found = difference_of(setting, reference, result.metric, by_rows)
            for task in result.tasks:
                if (of_task := difference_of(setting, reference, Metric(task), by_rows)) is not None:
                    of_tasks[task] = of_task
        result.differences.append(found)
        result.by_task.append(dict(zip(of_tasks, corrected(list(of_tasks.values())), strict=True)))
    count = len(result.ranked)
    family = 0 if result.baseline else count * (count - 1) // 2
    adjusted = iter(corrected([d for d in result.differences if d is not None], family))
    result.differences = [None if d is None else next(adjusted) for d in result.differences]


def _require_known(runs: Sequence[Run], metrics: Sequence[str], by: Sequence[str]) -> None:
    """Raises UserError for a key or a metric that no run has."""
    keys = sorted({key for run in runs for key in run.values})
    for key in by:
        if key not in keys:
            raise UserError(f"--group-by {key}: no run has this key{nearest(key, keys) or '.'}")
    names = ["mean", "worst", *dict.fromkeys(name for run in runs for name in (*run.tasks, *run.names()))]
    for metric in metrics if any(run.rows or run.metrics for run in runs) else ():
        if metric not in names:
            raise UserError(f"--metric {metric}: no run logged this metric{nearest(metric, names) or '.'}")
