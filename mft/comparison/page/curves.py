"""Pictures over optimizer steps: learning curves of the best settings, and the weights of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from mft.comparison.baseline import SingleTasks
from mft.comparison.compare import Comparison
from mft.comparison.page.differences import name_of
from mft.comparison.page.svg import INK, Canvas, Entry, Section, short
from mft.comparison.settings import Metric, Setting
from mft.training.panels import COLORS, MOST, color_of, most

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CURVES = 12
"""Settings drawn in a picture of curves, the best first; the table has all."""

DASHES = ("", "5 2", "1.5 1.5", "7 2 1.5 2")
"""As stroke-dasharray, in widths of the line."""

HUES = COLORS[:6]  # the last one is black


@dataclass(frozen=True)
class Look:
    """How the curves of a setting are drawn."""

    color: str
    dash: str

    @property
    def style(self) -> str | tuple[int, tuple[float, ...]]:
        """As matplotlib has it."""
        return (0, tuple(float(part) for part in self.dash.split())) if self.dash else "-"


def looks(settings: Sequence[Setting]) -> tuple[list[Look], list[Entry]]:
    """Returns how each setting is drawn, and the legend.

    Colours stand for the values of one key and dashes for those of another where two keys tell the settings
    apart and there are enough of both; otherwise each setting has a colour and a dash of its own.
    """
    values = {key: list(dict.fromkeys(s.keys[key] for s in settings)) for s in settings for key in s.keys}
    varying = sorted((key for key in values if len(values[key]) > 1), key=lambda key: -len(values[key]))
    if len(varying) == 2 and len(values[varying[0]]) <= len(HUES) and len(values[varying[1]]) <= len(DASHES):
        hue, dash = varying
        found = [
            Look(HUES[values[hue].index(s.keys[hue])], DASHES[values[dash].index(s.keys[dash])])
            for s in settings
        ]
        entries = [Entry(f"{hue}={value}", HUES[place]) for place, value in enumerate(values[hue])]
        entries += [Entry(f"{dash}={value}", INK, DASHES[place]) for place, value in enumerate(values[dash])]
        return found, entries
    found = [Look(HUES[i % len(HUES)], DASHES[i // len(HUES) % len(DASHES)]) for i in range(len(settings))]
    entries = [
        Entry(name_of(setting), look.color, look.dash) for setting, look in zip(settings, found, strict=True)
    ]
    return found, entries


def learning(comparison: Comparison, canvas: Canvas) -> Section | None:
    """Draws the metric and the loss of every task over steps, for the best settings and the baseline."""
    shown = comparison.ranked[:MOST_CURVES]
    styles, legend = looks(shown)
    reference = comparison.reference
    if comparison.baseline and reference is not None and all(reference is not setting for setting in shown):
        shown, styles = [*shown, reference], [*styles, Look(INK, DASHES[2])]
        legend.append(Entry(f"baseline: {name_of(reference)}", INK, DASHES[2]))
    tasks = worst_tasks(comparison)
    panels = [comparison.metric.name, *(task for task in tasks if task != comparison.metric.name)]
    if len(comparison.tasks) == 1 and comparison.metric.name in ("mean", "worst"):
        panels = panels[1:]  # it is that of the task
    pictures, cut = [], False
    for name in panels:
        series = [by_step(setting, name) for setting in shown]
        if max((len(points) for points in series), default=0) < 2:
            continue
        pictures.append(
            canvas.picture(
                f"{name} over optimizer steps, by setting",
                lambda axis, name=name, of=series: _curves(axis, name, of, styles),  # type: ignore[misc]
            )
        )
        cut = cut or any(_ceiling(series) < max(values) for points in series for values in points.values())
    if not pictures:
        return None
    count = len(comparison.ranked)
    text = [
        f"The best {MOST_CURVES} of {count:,} settings." if count > MOST_CURVES else "",
        few_tasks(comparison, tasks),
        "Mean over seeds, band: lowest to highest seed. Where curves lie on each other, the better setting "
        "is the thinner one on top.",
        "Curves that leave a panel begin higher." if cut else "",
    ]
    return Section("Learning curves", text, pictures, legend)


def weights(comparison: Comparison, canvas: Canvas) -> Section | None:
    """Draws the weights that adaptive losses gave to the tasks over steps, a picture for each setting."""
    tasks = worst_tasks(comparison)
    adaptive = [
        (setting, series)
        for setting in comparison.ranked[:MOST_ROOM]
        if any(series := [by_step(setting, f"train/weight/{task}") for task in tasks])
    ]
    if not adaptive:
        return None
    shown = adaptive[:MOST_CURVES]
    colors = [str(color_of(task, tasks)) if len(tasks) <= len(HUES) else _hex(task, tasks) for task in tasks]

    highest = max(v for _, series in shown for points in series for values in points.values() for v in values)

    def draw(axis: Axes, title: str, series: Sequence[dict[int, list[float]]]) -> None:
        axis.set_title(short(title, 44))
        for place, (color, points) in enumerate(zip(colors, series, strict=True)):
            means = [fmean(values) for values in points.values()]
            # Equal weights lie on each other: a later line is thinner, so that an earlier one shows below it.
            axis.plot(list(points), means, color=color, linewidth=1.2 + 2.4 * (1 - (place + 1) / len(colors)))
        axis.set_ylim(0, 1.05 * highest)  # one scale, so that settings can be compared
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("weight")

    pictures = [
        canvas.picture(
            f"weights of the tasks over optimizer steps: {setting.title}",
            lambda axis, one=setting, of=series: draw(axis, name_of(one), of),  # type: ignore[misc]
        )
        for setting, series in shown
    ]
    text = [
        f"The best {MOST_CURVES} of the settings with such weights." if len(adaptive) > MOST_CURVES else "",
        few_tasks(comparison, tasks),
        "Mean over seeds.",
    ]
    legend = [Entry(task, color) for task, color in zip(tasks, colors, strict=True)]
    return Section("Weights of the tasks over time", text, pictures, legend)


MOST_ROOM = 4 * MOST_CURVES
"""Settings, the best first, in which weights are looked for."""


def worst_tasks(comparison: Comparison) -> list[str]:
    """Returns the tasks that have a picture: all, or of very many those with the highest loss."""
    if len(comparison.tasks) <= MOST - 2:
        return comparison.tasks
    highest = {
        task: max((setting.mean(Metric(task)) for setting in comparison.ranked[:MOST_CURVES]), default=0.0)
        for task in comparison.tasks
    }
    return most(comparison.tasks, highest, MOST - 2)


def few_tasks(comparison: Comparison, tasks: Sequence[str]) -> str:
    """Returns a sentence where not every task has a picture."""
    every = len(comparison.tasks)
    return f"The {len(tasks)} tasks with the highest loss of {every}." if len(tasks) < every else ""


def by_step(setting: Setting, name: str) -> dict[int, list[float]]:
    """Returns the values of all seeds by step; {} for a mean over tasks of runs on one task each."""
    points: dict[int, list[float]] = {}
    if isinstance(setting, SingleTasks) and name in ("mean", "worst"):
        return points
    for judged in setting.judged:
        for step, value in judged.series(name):
            points.setdefault(step, []).append(value)
    return dict(sorted(points.items()))


def _curves(axis: Axes, name: str, series: Sequence[dict[int, list[float]]], styles: Sequence[Look]) -> None:
    last = len(series) - 1
    for place in range(last, -1, -1):  # the best on top
        points, look = series[place], styles[place]
        if not points:
            continue
        behind = place / max(last, 1)
        steps, means = list(points), [fmean(values) for values in points.values()]
        low, high = (list(map(end, points.values())) for end in (min, max))
        axis.fill_between(steps, low, high, color=look.color, alpha=0.1, linewidth=0)
        axis.plot(
            steps,
            means,
            color=look.color,
            linestyle=look.style,
            linewidth=1.2 + 3.2 * behind,
            alpha=1 - 0.55 * behind,
            marker="o" if len(steps) < 3 else "",
            markersize=3,
        )
    axis.set_title(short(name, 44))
    axis.set_xlabel("optimizer step")
    ceiling = _ceiling(series)
    lowest = min(value for points in series for values in points.values() for value in values)
    if ceiling > lowest:
        axis.set_ylim(lowest - 0.05 * (ceiling - lowest), ceiling)


def _ceiling(series: Sequence[dict[int, list[float]]]) -> float:
    """Returns up to where curves are drawn: so that what they start from does not press them flat."""
    first = min((step for points in series for step in points), default=0)
    last = max((step for points in series for step in points), default=0)
    every = [(step, value) for points in series for step, values in points.items() for value in values]
    highest = max(value for _, value in every)
    later = [value for step, value in every if step > first + 0.3 * (last - first)]
    low, high = (min(later), max(later)) if later else (highest, highest)
    room = high + 0.6 * (high - low)
    return highest + 0.05 * (high - low) if not later or highest <= room or high == low else room


def _hex(task: str, tasks: Sequence[str]) -> str:
    from matplotlib.colors import to_hex

    return to_hex(color_of(task, tasks))
