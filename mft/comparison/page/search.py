"""Pictures of a search over continuous keys: parallel coordinates, and the surface of the two that matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from mft.comparison.compare import Comparison
from mft.comparison.effects import MANY, Effect
from mft.comparison.page.keys import SHADES, explained_first, values_of
from mft.comparison.page.svg import BAD, INK, PANEL, Canvas, Section, hint, short
from mft.comparison.settings import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SETTINGS = 300
"""Lines of the parallel coordinates, the best first."""

CELLS = 10
"""Of the surface along each axis, from so many points on that there is one for each cell."""

MOST_AXES = 7
FEWEST = 8
"""Settings from which these pictures say something."""

DECADE = 10
"""Highest over lowest value from which an axis may be logarithmic: where values lie as in a geometric row."""


@dataclass(frozen=True)
class Scale:
    """One key as an axis from 0 to 1."""

    key: str
    place: dict[str, float]
    """Value → place on the axis."""
    ticks: Sequence[tuple[float, str]]
    log: bool = False
    numbers: bool = True


def coordinates(found: Sequence[Effect], comparison: Comparison, canvas: Canvas) -> Section | None:
    """Draws each setting as a line over its keys, and the metric over the two continuous keys that matter."""
    ranked = comparison.ranked[:MOST_SETTINGS]
    keys = explained_first(found, comparison)
    scales = [scale(key, values) for key in keys if len(values := values_of(comparison, key)) > 1]
    continuous = [one for one in scales if one.numbers and len(one.place) >= MANY]
    if len(ranked) < FEWEST or not continuous or len(scales) < 2:
        return None
    drawn = scales[:MOST_AXES]
    pictures = [
        canvas.picture(
            f"keys and {comparison.metric.name} of {len(ranked)} settings as parallel coordinates",
            lambda axis: _parallel(axis, comparison, ranked, drawn),
            (max(5.5, 1.5 * (len(drawn) + 1)), 3.4),
        )
    ]
    text = [
        f"The best {len(ranked)} of {len(comparison.ranked):,} settings."
        if len(ranked) < len(comparison.ranked)
        else "",
        f"{len(drawn)} of {len(scales)} keys, those that explain most." if len(drawn) < len(scales) else "",
        "A line is a setting; dark is good, the best one is thick.",
    ]
    if len(continuous) > 1:
        draw = _surface(comparison, continuous[0], continuous[1])
        if draw is not None:
            size = (1.4 * PANEL[0], 1.25 * PANEL[1])
            label = f"{comparison.metric.name} over {continuous[0].key} and {continuous[1].key}"
            pictures.append(canvas.picture(label, draw, size))
            text.append(
                "The surface is interpolated between the points that were run; other keys differ among them. "
                "Ring: the best one."
            )
            if len(comparison.ranked) > CELLS**2:
                text.append(f"It is of means over the cells of a grid of {CELLS} by {CELLS}.")
    return Section("The search", text, pictures)


def scale(key: str, values: Sequence[str]) -> Scale:
    """Returns the axis of a key: linear or logarithmic, evenly spaced where values are words."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        numbers = {}
    if not numbers or not all(map(math.isfinite, numbers.values())):
        last = max(len(values) - 1, 1)
        place = {value: i / last for i, value in enumerate(values)}
        return Scale(key, place, [(at, short(value, 16)) for value, at in place.items()], numbers=False)
    low, high = min(numbers.values()), max(numbers.values())
    middle = median(numbers.values())
    log = low > 0 and high / low >= DECADE and middle < math.sqrt(math.sqrt(low * high) * (low + high) / 2)
    measure: Callable[[float], float] = math.log10 if log else float
    start, width = measure(low), measure(high) - measure(low)
    if len(values) <= 5:
        marked = sorted(numbers.values())
    else:
        marked = [start + part * width for part in (0, 0.25, 0.5, 0.75, 1)]
        marked = [10**value for value in marked] if log else marked
    ticks = [((measure(value) - start) / width, f"{value:.3g}") for value in marked]
    return Scale(key, {v: (measure(n) - start) / width for v, n in numbers.items()}, ticks, log)


def _parallel(axis: Axes, comparison: Comparison, ranked: Sequence[Setting], scales: Sequence[Scale]) -> None:
    import matplotlib

    metric = comparison.metric
    means = [setting.mean(metric) for setting in ranked]
    low, high = min(means), max(means)
    colors = matplotlib.colormaps["viridis"]
    last = len(scales)
    for rank in range(len(ranked) - 1, -1, -1):  # the best on top
        setting, mean = ranked[rank], means[rank]
        places = [one.place[setting.keys[one.key]] for one in scales]
        at = (mean - low) / (high - low) if high > low else 0.5
        # By rank: one bad setting would otherwise leave all others in one colour.
        color = BAD if rank == 0 else colors(0.9 * rank / max(len(ranked) - 1, 1))
        (line,) = axis.plot(
            range(last + 1),
            [*places, at],
            color=color,
            linewidth=2.2 if rank == 0 else 0.9,
            alpha=1 if rank == 0 else 0.75,
        )
        if len(ranked) <= 100:
            line.set_gid(hint(f"{rank + 1}: {setting.title}: {mean:.4f}"))
    ends = [(part, f"{low + part * (high - low):.4g}") for part in (0, 0.5, 1)]
    for x, ticks in enumerate([*(one.ticks for one in scales), ends]):
        axis.axvline(x, color=INK, linewidth=0.8)
        for y, text in ticks:
            axis.text(x + 0.03, y, text, fontsize=7.5, va="center", bbox=None)
    names = [short(one.key + (" (log)" if one.log else ""), 22) for one in scales]
    axis.set_xticks(range(last + 1), [*names, short(metric.name, 22)])
    axis.set_yticks([])
    axis.grid(False)
    axis.tick_params(axis="x", length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xlim(-0.1, last + 0.35)


def _surface(comparison: Comparison, across: Scale, up: Scale) -> Callable[[Axes], None] | None:
    """Returns what draws the metric over two keys; None where the points lie on a line."""
    import numpy as np

    metric, ranked = comparison.metric, comparison.ranked
    places = np.array([(across.place[s.keys[across.key]], up.place[s.keys[up.key]]) for s in ranked])
    values = np.array([setting.mean(metric) for setting in ranked])
    # Many points would show the noise of each: those of a cell count as one.
    cells = np.round(places * CELLS) if len(ranked) > CELLS**2 else places
    _, cell = np.unique(cells, axis=0, return_inverse=True)
    counts = np.bincount(cell.ravel())
    points = np.stack([np.bincount(cell.ravel(), column) / counts for column in places.T], axis=1)
    means = np.bincount(cell.ravel(), values) / counts
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False) if len(points) >= FEWEST else [0]
    if min(spread) < 1e-3 or means.min() == means.max():
        return None

    def draw(axis: Axes) -> None:
        colors = "viridis_r" if metric.higher else "viridis"
        # Up to the 90th percentile: the differences among good settings are what one looks for.
        low, high = np.quantile(means, (0.1, 1) if metric.higher else (0, 0.9))
        levels = np.linspace(low, high, SHADES) if high > low else SHADES
        filled = axis.tricontourf(
            points[:, 0], points[:, 1], means, levels=levels, cmap=colors, extend="both"
        )
        few = len(ranked) <= CELLS**2
        axis.plot(
            *places[:MOST_SETTINGS].T, ".", color=INK, markersize=4 if few else 2, alpha=1 if few else 0.5
        )
        axis.plot(*places[0], "o", color=BAD, fillstyle="none", markersize=10, markeredgewidth=2)
        bar = axis.figure.colorbar(filled, ax=axis, aspect=18, pad=0.03)
        bar.set_label(short(metric.name))
        bar.ax.grid(False)
        if not metric.higher:
            bar.ax.invert_yaxis()  # good is up
        axis.set_xticks(*zip(*across.ticks, strict=True))
        axis.set_yticks(*zip(*up.ticks, strict=True))
        axis.set_xlabel(short(across.key + (" (log)" if across.log else ""), 44))
        axis.set_ylabel(short(up.key + (" (log)" if up.log else ""), 32))
        axis.margins(0.04)
        axis.grid(False)

    return draw
