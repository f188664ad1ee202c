"""Pictures of trade-offs: the metric over what a run costs, two tasks against each other, time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from mft.comparison.compare import Comparison
from mft.comparison.multitask import front
from mft.comparison.page.differences import MOST_LINES, WIDE, height, limited, name_lines, name_of
from mft.comparison.page.svg import GOOD, GREY, INK, Canvas, Entry, Section, hint, short
from mft.comparison.page.units import COSTS, count, number
from mft.comparison.settings import Metric, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 400
"""Points beside the front, those of the best settings."""

MOST_PAIRS = 3
"""Pairs of tasks, those that disagree most."""

TELLS = 1.01
"""Highest over lowest cost from which a picture of it says something."""


def fronts(comparison: Comparison, canvas: Canvas) -> Section | None:
    """Draws which settings no other one beats, on costs and on pairs of tasks."""
    metric, ranked = comparison.metric, comparison.ranked
    pictures = []
    for name, (called, _) in COSTS.items():
        costs = [(setting, setting.cost(name)) for setting in ranked]
        points = [(setting, cost, setting.mean(metric)) for setting, cost in costs if cost is not None]
        if name != "memory" and _tells([cost for _, cost, _ in points]):
            x_label = {"seconds": "time of a run (s)"}.get(name, f"{called} of a run")
            draw = _scatter(ranked, points, (x_label, metric.name), (1, metric.sign), name != "seconds")
            pictures.append(canvas.picture(f"{metric.name} over {called}, by setting", draw))
    pairs = conflicting(comparison)
    for one, other in pairs:
        points = [(s, s.mean(Metric(one)), s.mean(Metric(other))) for s in ranked]
        points = [point for point in points if not math.isnan(point[1] + point[2])]
        draw = _scatter(ranked, points, (f"loss of {one}", f"loss of {other}"), (1, 1))
        pictures.append(canvas.picture(f"loss of {other} over that of {one}, by setting", draw))
    if not pictures:
        return None
    many = f"Beside the front the best {MOST_POINTS} settings." if len(ranked) > MOST_POINTS else ""
    every = len(comparison.tasks) * (len(comparison.tasks) - 1) // 2
    text = [
        "On the front: no other setting is at least as good on both axes and better on one. "
        "Numbers are ranks.",
        many,
        f"The {len(pairs)} pairs of tasks that disagree most, of {every}." if 0 < len(pairs) < every else "",
    ]
    legend = [Entry("on the front", GOOD, shape="disc"), Entry("beaten", GREY, shape="ring")]
    return Section("Trade-offs", text, pictures, legend)


def resources(comparison: Comparison, canvas: Canvas) -> Section | None:
    """Draws time, tokens, FLOPs and memory of a run, those of them that differ."""
    ranked = comparison.ranked[:MOST_LINES]
    pictures, text = [], [limited(comparison)]
    for name, (called, written) in COSTS.items():
        costs = [setting.cost(name) for setting in ranked]
        known = [cost for cost in costs if cost is not None]
        if not known or len(ranked) < 2:
            continue
        if not _tells(known):
            text.append(f"{called[0].upper()}{called[1:]}: {written(max(known))} in all of them.")
            continue
        pictures.append(
            canvas.picture(
                f"{called} of a run, by setting",
                lambda axis, costs=costs, called=called, written=written: _bars(  # type: ignore[misc]
                    axis, ranked, costs, called, written
                ),
                (WIDE, height(len(ranked))),
            )
        )
    return Section("Time and memory", text, pictures) if pictures else None


def conflicting(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns the pairs of tasks whose losses agree least over the settings (Spearman), the first first."""
    import pandas as pd

    ranked, tasks = comparison.ranked, comparison.tasks
    if len(ranked) < 3 or len(tasks) < 2:
        return []
    losses = pd.DataFrame({i: [s.mean(Metric(task)) for s in ranked] for i, task in enumerate(tasks)})
    ranks = losses.rank()
    agreement = {(tasks[i], tasks[j]): ranks[i].corr(ranks[j]) for i, j in combinations(ranks.columns, 2)}
    known = [pair for pair, value in agreement.items() if not math.isnan(value)]
    return sorted(known, key=lambda pair: agreement[pair])[:MOST_PAIRS]


def _tells(costs: Sequence[float]) -> bool:
    return len(costs) > 1 and max(costs) > TELLS * min(costs)


def _scatter(
    ranked: Sequence[Setting],
    points: Sequence[tuple[Setting, float, float]],
    names: tuple[str, str],
    signs: tuple[int, int],
    counted: bool = False,
) -> Callable[[Axes], None]:
    """Returns what draws points with their front.

    signs: 1 where lower is better, else -1; counted: whether x are large numbers, of tokens or FLOPs.
    """
    on_front = front([(signs[0] * x, signs[1] * y) for _, x, y in points])
    best = sorted((point for point, on in zip(points, on_front, strict=True) if on), key=lambda p: p[1])
    beaten = [(x, y) for (_, x, y), on in zip(points, on_front, strict=True) if not on]
    beaten = beaten[:MOST_POINTS] or [(math.nan, math.nan)]
    rank = {id(setting): place for place, setting in enumerate(ranked, start=1)}
    ahead: dict[str, Any] = {"color": GOOD, "marker": "o", "linestyle": "", "markersize": 5, "zorder": 3}
    behind = ahead | {"color": GREY, "fillstyle": "none", "alpha": 0.8, "zorder": 2}

    def draw(axis: Axes) -> None:
        if len(points) > MOST_TITLES:  # a group for each point would take seconds
            axis.plot(*zip(*beaten, strict=True), **behind)
            axis.plot(*zip(*((x, y) for _, x, y in best), strict=True), **ahead)
        for (setting, x, y), on in zip(points, on_front, strict=True) if len(points) <= MOST_TITLES else ():
            (dot,) = axis.plot([x], [y], **(ahead if on else behind))
            dot.set_gid(hint(f"{rank[id(setting)]}: {setting.title}: {number(x)}, {number(y)}"))
        axis.step([x for _, x, _ in best], [y for _, _, y in best], where="post", color=GOOD, linewidth=1)
        axis.set_xlabel(short(names[0], 44))
        axis.set_ylabel(short(names[1], 32))
        axis.margins(0.1)
        _number(axis, {rank[id(setting)]: (x, y) for setting, x, y in best})
        axis.locator_params(nbins=6)
        if counted:
            axis.xaxis.set_major_formatter(lambda x, _: count(x))

    return draw


def _number(axis: Axes, ranks: Mapping[int, tuple[float, float]]) -> None:
    """Writes ranks beside their points, but not where they would lie on that of a better one."""
    axis.autoscale_view()  # else the limits are not those of the points yet
    taken: list[tuple[float, float]] = []
    for rank, point in sorted(ranks.items()):
        x, y = axis.transLimits.transform(point)
        if all(abs(x - left) > 0.1 or abs(y - low) > 0.1 for left, low in taken):
            axis.annotate(str(rank), point, (4, 4), textcoords="offset points", color=INK)
            taken.append((x, y))


MOST_TITLES = 120
"""Points of a picture of which each says what it is where the pointer rests on it."""


def _bars(
    axis: Axes,
    settings: Sequence[Setting],
    costs: Sequence[float | None],
    called: str,
    written: Callable[[float], str],
) -> None:
    for place, cost in enumerate(costs):
        if cost is not None:
            axis.barh(place, cost, height=0.62, color="#56B4E9", alpha=0.75)
            axis.text(cost, place, f" {written(cost)}", va="center", fontsize=7.5)
    name_lines(axis, [name_of(setting) for setting in settings])
    axis.set_xlim(0, 1.16 * max(cost for cost in costs if cost is not None))
    axis.xaxis.set_major_formatter(lambda x, _: written(x))
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(f"{called} of a run")
