"""What a mean over tasks hides: gains and losses by task, the worst of them, and what no setting beats.

Losses are means over seeds, in nats per token; per cents are of the reference's loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mft.comparison.compare import Comparison
from mft.comparison.settings import Metric, Setting

COSTS = ("seconds", "tokens", "flops")
"""What a run costs, as attributes of `Run`."""


@dataclass(frozen=True)
class MultiTask:
    """One setting over all tasks of a comparison."""

    delta_m: float | None
    """Mean over tasks of the loss saved against the reference, in per cent: higher is better. (Maninis et al.
    2019, "Attentive Single-Tasking of Multiple Tasks", where it is a mean drop.) None for the reference."""
    regret: float | None
    """How far the task that is worst off lies behind the best setting on it, in per cent; 0 is best."""
    regret_task: str
    won: tuple[str, ...]
    """Tasks with a lower loss than the reference, told apart from it after the correction over tasks."""
    lost: tuple[str, ...]
    undecided: tuple[str, ...]
    """Tasks that are neither; with one seed all of them."""
    on_front: bool
    """Whether no other setting is at least as good on every task, and better on one."""
    cheap_front: tuple[str, ...]
    """Costs of which no other setting with a value as good takes as little."""


def multitask(comparison: Comparison) -> list[MultiTask]:
    """Returns the account of every setting of a comparison."""
    tasks, settings = comparison.tasks, comparison.settings
    losses = [losses_of(setting, tasks) for setting in settings]
    reference = losses_of(comparison.reference, tasks) if comparison.reference else {}
    best = {task: min((of[task] for of in losses if task in of), default=math.nan) for task in tasks}
    whole = [[of[task] for task in tasks] if tasks and len(of) == len(tasks) else None for of in losses]
    on_front = front(whole)
    fronts = {name: front(_with_cost(comparison, name)) for name in COSTS}
    result = []
    for place, (setting, of) in enumerate(zip(settings, losses, strict=True)):
        behind = {task: 100 * (loss - best[task]) / best[task] for task, loss in of.items() if best[task] > 0}
        worst = max(behind, key=lambda task: behind[task], default="")
        by_task = comparison.by_task[place]
        won, lost = (
            tuple(t for t, d in by_task.items() if d.told_apart and sign * d.estimate < 0) for sign in (1, -1)
        )
        known = MultiTask(
            delta_m=None if setting is comparison.reference else delta_m(of, reference),
            regret=behind.get(worst),
            regret_task=worst,
            won=won,
            lost=lost,
            undecided=tuple(task for task in by_task if task not in won + lost),
            on_front=on_front[place],
            cheap_front=tuple(name for name in COSTS if fronts[name][place]),
        )
        result.append(known)
    return result


def losses_of(setting: Setting, tasks: Sequence[str]) -> dict[str, float]:
    """Returns the mean loss of a setting on each of the tasks that it has."""
    found = {task: setting.mean(Metric(task)) for task in tasks}
    return {task: loss for task, loss in found.items() if not math.isnan(loss)}


def over_tasks(losses: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """Returns mean and worst of the losses of all tasks, {} unless every one has a loss."""
    known = [losses[task] for task in tasks if task in losses]
    return {"mean": fmean(known), "worst": max(known)} if known and len(known) == len(tasks) else {}


def delta_m(losses: dict[str, float], reference: dict[str, float]) -> float | None:
    """Returns the mean over their common tasks of the loss saved, in per cent; None without any."""
    saved = [1 - losses[task] / loss for task, loss in reference.items() if task in losses and loss > 0]
    return 100 * sum(saved) / len(saved) if saved else None


def front(points: Sequence[Sequence[float] | None]) -> list[bool]:
    """Returns whether each point is on the Pareto front: none is as low in all places and lower in one."""

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    known = [point for point in points if point is not None]
    return [point is not None and not any(beats(other, point) for other in known) for point in points]


def _with_cost(comparison: Comparison, name: str) -> list[tuple[float, float] | None]:
    metric = comparison.metric
    points: list[tuple[float, float] | None] = []
    for setting in comparison.settings:
        cost, value = setting.cost(name), setting.mean(metric)
        points.append(None if cost is None or math.isnan(value) else (metric.sign * value, cost))
    return points
