"""Pictures of what each key does: its main effect, and two keys together as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from mft.comparison.compare import Comparison
from mft.comparison.effects import Effect
from mft.comparison.page.curves import few_tasks, worst_tasks
from mft.comparison.page.svg import GREY, INK, PANEL, Canvas, Section, short
from mft.comparison.settings import SEED, Metric, Setting
from mft.comparison.verdicts import p_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_KEYS = 9
"""Keys whose effect is drawn, those that explain most first."""

MOST_VALUES = 12
"""Values of a key in a picture of all of them."""

SHADES = 14
"""Steps of a colour bar: a smooth one would be hundreds of shapes."""

FILLED = 0.6
"""Part of the cells that a heat map has to have a value of."""


def main_effects(found: tuple[list[Effect], float], comparison: Comparison, canvas: Canvas) -> Section | None:
    """Draws what each value of each key adds to the metric, and how much of the variance the key explains.

    found: what `effects.effects` returns.
    """
    keys, rest = found
    swept = [effect for effect in keys if effect.key != SEED]
    known = [effect for effect in swept if effect.levels]
    drawn = [effect for effect in known if len(effect.levels) <= MOST_VALUES][:MOST_KEYS]
    if len(swept) < 2 or not any(effect.share for effect in swept):
        return None
    name = comparison.metric.name
    largest = _reach(drawn)
    pictures = [_shares(canvas, keys[: MOST_KEYS + 1], rest)]
    for effect in drawn:
        size = (PANEL[0], max(1.7, 0.95 + 0.2 * len(effect.levels)))
        pictures.append(
            canvas.picture(
                f"effect of {effect.key} on {name}",
                lambda axis, effect=effect: _effect(axis, effect, name, largest),  # type: ignore[misc]
                size,
            )
        )
    text = [
        "A linear model of main effects over all runs. Dot: how far runs with this value lie from the mean "
        "of all, the other keys being equal; line: 95 % interval.",
        "The variance that no key explains is of seeds, and of keys that change each other's effect.",
    ]
    if len(drawn) < len(known):
        few = f"{len(drawn)} of {len(known)} keys, those that explain most"
        text.append(f"{few}; keys with more than {MOST_VALUES} values have no picture.")
    if together := [effect.key for effect in swept if not effect.levels]:
        text.append(f"Not told from other keys, with which values change together: {', '.join(together)}.")
    return Section("What each key does", text, pictures)


def heat(found: Sequence[Effect], comparison: Comparison, canvas: Canvas) -> Section | None:
    """Draws the metric and every task over the two keys that explain most, where the grid is filled."""
    pair = _grid(found, comparison)
    if pair is None:
        return None
    tasks = worst_tasks(comparison)
    names = [comparison.metric.name, *(["worst"] if comparison.metric.name == "mean" else []), *tasks]
    names = [name for name in dict.fromkeys(names) if len(comparison.tasks) > 1 or name != "worst"]
    metrics = [comparison.metric if name == comparison.metric.name else Metric(name) for name in names]
    if len(comparison.tasks) == 1 and names[0] == "mean":
        metrics = metrics[1:]
    y_values, x_values = (values_of(comparison, key) for key in pair)
    size = (1.9 + 0.52 * len(x_values), max(1.8, 1.1 + 0.3 * len(y_values)))
    pictures = []
    for metric in metrics:
        cells = [
            [_cell(comparison.ranked, {pair[0]: y, pair[1]: x}, metric) for x in x_values] for y in y_values
        ]
        pictures.append(
            canvas.picture(
                f"{metric.name} by {pair[0]} and {pair[1]}",
                lambda axis, metric=metric, cells=cells: _map(  # type: ignore[misc]
                    axis, metric, cells, pair, (y_values, x_values)
                ),
                size,
            )
        )
    others = [key for key in comparison.settings[0].keys if key not in pair]
    text = [
        f"{pair[0]} (down) and {pair[1]} (across). Dark is good.",
        f"Means over {', '.join(others)} and seeds." if others else "Means over seeds.",
        few_tasks(comparison, tasks),
    ]
    return Section("Two keys together", text, pictures)


def values_of(comparison: Comparison, key: str) -> list[str]:
    """Returns the values of a key in the settings that have a result, numbers in their order."""
    return sorted({setting.keys[key] for setting in comparison.ranked if key in setting.keys}, key=order)


def order(value: str) -> tuple[bool, float, str]:
    """Returns what values are sorted by: numbers first, by their size."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def explained_first(found: Sequence[Effect], comparison: Comparison) -> list[str]:
    """Returns the keys of the settings, those that explain most first."""
    ranked = comparison.ranked
    share = {effect.key: effect.share for effect in found}
    keys = list(ranked[0].keys) if ranked else []
    return sorted(keys, key=lambda key: -share.get(key, 0.0))


def _grid(found: Sequence[Effect], comparison: Comparison) -> tuple[str, str] | None:
    """Returns the key that goes down and the one that goes across; None where they make no filled grid."""
    keys = [
        key
        for key in explained_first(found, comparison)
        if 2 <= len(values_of(comparison, key)) <= MOST_VALUES
    ][:2]
    if len(keys) < 2:
        return None
    cells = {tuple(setting.keys[key] for key in keys) for setting in comparison.ranked}
    down, across = sorted(keys, key=lambda key: max(map(len, values_of(comparison, key))), reverse=True)
    room = len(values_of(comparison, down)) * len(values_of(comparison, across))
    return (down, across) if len(cells) >= FILLED * room else None


def _cell(settings: Sequence[Setting], keys: dict[str, str], metric: Metric) -> float:
    values = [v for s in settings if keys.items() <= s.keys.items() for v in s.values(metric).values()]
    return fmean(values) if values else math.nan


def _map(
    axis: Axes,
    metric: Metric,
    cells: Sequence[Sequence[float]],
    keys: tuple[str, str],
    values: tuple[Sequence[str], Sequence[str]],
) -> None:
    import matplotlib

    known = [value for line in cells for value in line if not math.isnan(value)]
    colors = matplotlib.colormaps["viridis_r" if metric.higher else "viridis"].resampled(SHADES)
    mesh = axis.pcolormesh(cells, cmap=colors, edgecolors="none")
    axis.invert_yaxis()
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xticks([x + 0.5 for x in range(len(values[1]))], [short(value, 12) for value in values[1]])
    axis.set_yticks([y + 0.5 for y in range(len(values[0]))], [short(value, 18) for value in values[0]])
    axis.set_xlabel(short(keys[1]))
    axis.set_title(short(f"{metric.name} task" if metric.name == "worst" else metric.name, 36))
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if math.isnan(value):
                axis.text(x + 0.5, y + 0.5, "–", ha="center", va="center", color=GREY)
                continue
            at = (value - min(known)) / (max(known) - min(known)) if max(known) > min(known) else 0.0
            red, green, blue, _ = colors(at)
            ink = "#ffffff" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "#000000"
            axis.text(x + 0.5, y + 0.5, f"{value:.3f}", ha="center", va="center", fontsize=7.5, color=ink)
    if known and max(known) > min(known):
        bar = axis.figure.colorbar(mesh, ax=axis, aspect=14, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7)
        bar.ax.grid(False)
        if not metric.higher:
            bar.ax.invert_yaxis()  # good is up


def _reach(drawn: Sequence[Effect]) -> float:
    ends = [
        abs(end)
        for effect in drawn
        for level in effect.levels
        for end in (level.effect, level.low, level.high)
        if not math.isnan(end)
    ]
    return max(ends, default=0.0)


def _effect(axis: Axes, effect: Effect, name: str, reach: float) -> None:
    axis.axvline(0, color=INK, linewidth=0.8)
    for place, level in enumerate(effect.levels):
        if not math.isnan(level.low):
            axis.plot([level.low, level.high], [place, place], color="#0072B2", linewidth=1.8)
        axis.plot([level.effect], [place], "o", color="#0072B2", markersize=5)
    labels = [short(f"{level.value}  ({level.runs})", 26) for level in effect.levels]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlim(-1.08 * reach, 1.08 * reach)  # one scale, so that keys can be compared
    axis.locator_params(axis="x", nbins=5)
    axis.grid(False, axis="y")
    p = f", {p_says(effect.p)}" if p_text(effect.p) else ""
    axis.set_title(f"{short(effect.key, 24)}: {100 * effect.share:.0f} %{p}")
    axis.set_xlabel(short(f"effect on {name} (runs in brackets)", 44))


def p_says(p: float) -> str:
    """Returns p = 0.043 or p < 0.001."""
    text = p_text(p)
    return f"p {text[0]} {text[1:]}" if text.startswith("<") else f"p = {text}"


def _shares(canvas: Canvas, drawn: Sequence[Effect], rest: float):  # type: ignore[no-untyped-def]
    lines = [*((short(effect.key, 24), effect.share) for effect in drawn), ("not explained", rest)]

    def draw(axis: Axes) -> None:
        for place, (_, share) in enumerate(lines):
            axis.barh(place, 100 * share, height=0.62, color="#56B4E9", alpha=0.75)
            axis.text(100 * share, place, f" {100 * share:.0f} %", va="center", fontsize=7.5)
        axis.set_yticks(range(len(lines)), [name for name, _ in lines])
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.set_xlim(0, 115 * max(share for _, share in lines))
        axis.grid(False, axis="y")
        axis.set_title("share of the variance between runs")
        axis.set_xlabel("%")

    return canvas.picture("share of the variance of each key", draw, (PANEL[0], 0.95 + 0.21 * len(lines)))
