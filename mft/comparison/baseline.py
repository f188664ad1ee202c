"""What settings are compared with: the one that a person names, the single-task runs, or the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from mft.comparison.differences import differing
from mft.comparison.rows import Weighted
from mft.comparison.settings import Block, Judged, Metric, Setting, settings_of
from mft.errors import UserError, nearest
from mft.runs.results import Run

SINGLE = "single-task runs"
"""The baseline that is put together from runs on one task each."""


@dataclass
class SingleTasks(Setting):
    """Runs on one task each as one setting: what a mixture of tasks has to be better than."""

    parts: dict[str, Setting] = field(default_factory=dict)
    """Task → the runs on it alone; of several settings the one with the best mean."""
    complete: bool = True
    """Whether every task has such runs; otherwise their mean is no mean over the tasks of the others."""

    @property
    def judged(self) -> list[Judged]:
        return [judged for part in self.parts.values() for judged in part.judged]

    def value(self, block: Block, metric: Metric) -> float | None:
        if metric.name in self.parts:
            return self.parts[metric.name].value(block, metric)
        losses = [part.value(block, Metric(task)) for task, part in self.parts.items()]
        known = [loss for loss in losses if loss is not None]
        if metric.name not in ("mean", "worst") or len(known) < len(losses) or not self.complete:
            return None
        return fmean(known) if metric.name == "mean" else max(known)

    def rows(self, block: Block, metric: Metric) -> Weighted | None:
        tasks = [metric.name] if metric.name in self.parts else list(self.parts)
        found = [self.parts[task].rows(block, Metric(task)) for task in tasks]
        known = {
            task: rows[1][task] for task, rows in zip(tasks, found, strict=True) if rows and task in rows[1]
        }
        if len(known) < len(tasks):
            return None
        if metric.name == "worst":
            losses = {task: self.parts[task].value(block, Metric(task)) or 0.0 for task in tasks}
            return {max(tasks, key=lambda task: losses[task]): 1.0}, known
        return dict.fromkeys(tasks, 1 / len(tasks)), known

    def cost(self, name: str) -> float | None:
        """Returns what a run on each task takes together, of memory what the largest takes."""
        costs = [part.cost(name) for part in self.parts.values()]
        known = [cost for cost in costs if cost is not None]
        if not known or len(known) < len(costs) or not self.complete:
            return None
        return max(known) if name == "memory" else sum(known)


def divided(runs: Sequence[Run], metric: Metric, baseline: str) -> tuple[list[Run], list[Run]]:
    """Returns the runs on one task that are a baseline and no settings, and the runs to rank.

    Runs on one task beside runs on several are a baseline where they have all tasks between them, or where no
    task is common to all runs; otherwise all runs are ranked by their common tasks, and by a metric of whole
    runs, which a run on one task has as well. Raises UserError where
    `--baseline single` has nothing to compare, or with.
    """
    one = [run for run in runs if len(run.tasks) == 1]
    several = [run for run in runs if len(run.tasks) > 1]
    if baseline == "single" and not (several and one):
        raise UserError("--baseline single: needs runs on one task each, beside runs on several of them.")
    alone, mixed = {run.tasks[0] for run in one}, {task for run in several for task in run.tasks}
    common = mixed.intersection(*(run.tasks for run in (*one, *several)))
    unranked = bool(several and one) and (alone >= mixed or not common)
    over_tasks = metric.name in ("mean", "worst") and metric.name not in alone | mixed
    if baseline == "single" or (unranked and not baseline and over_tasks):
        return one, [run for run in runs if len(run.tasks) != 1]
    return [], list(runs)


def single_tasks(runs: Sequence[Run], tasks: Sequence[str], pairing: Sequence[str]) -> SingleTasks:
    """Returns the baseline of runs on one task each; tasks without such a run have no part in it."""
    parts = {}
    for task in tasks:
        of_task = [run for run in runs if run.tasks == [task]]
        keys = [key for key in differing(of_task) if key not in pairing]
        if of_task:
            parts[task] = settings_of(of_task, keys, pairing, Metric(task), [task])[0]
    blocks = {block: of_block for part in parts.values() for block, of_block in part.blocks.items()}
    return SingleTasks({"task": SINGLE}, blocks, SINGLE, parts=parts, complete=len(parts) == len(tasks))


def named(settings: Sequence[Setting], baseline: str) -> Setting:
    """Returns the setting that KEY=VALUE,… fits; UserError where it fits none or several."""
    wanted = [(key, value) for key, _, value in (part.partition("=") for part in baseline.split(","))]
    runs = [run for setting in settings for run in setting.runs]
    keys = sorted({key for run in runs for key in run.values})
    for key, value in wanted:
        if key and not value:
            having = [other for other in keys if key in {run.values.get(other) for run in runs}]
            hint = f"; did you mean {having[0]}={key}?" if having else "."
            raise UserError(f"--baseline {key}: expected KEY=VALUE{hint}")
        if key not in keys:
            raise UserError(f"--baseline {key}={value}: no run has this key{nearest(key, keys) or '.'}")
        values = sorted({run.values[key] for run in runs if key in run.values})
        if value not in values:
            allowed = f"Allowed: {', '.join(values)}{nearest(value, values) or '.'}"
            raise UserError(f"--baseline {key}={value}: no run has this value. {allowed}")
    fitting = [
        s for s in settings if all(run.values.get(key) == value for run in s.runs for key, value in wanted)
    ]
    if len(fitting) != 1:
        several = "; ".join(setting.title for setting in fitting[:4]) or "none"
        raise UserError(f"--baseline {baseline}: has to fit one setting, fits {len(fitting)}: {several}.")
    return fitting[0]
