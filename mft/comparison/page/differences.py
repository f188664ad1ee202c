"""Pictures of how settings differ: every seed, and the difference from the reference with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from mft.comparison.compare import Comparison
from mft.comparison.page.svg import BAD, GOOD, GREY, INK, Canvas, Section, hint, short
from mft.comparison.settings import Metric, Setting
from mft.comparison.statistics import Difference
from mft.comparison.verdicts import signed

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

MOST_LINES = 40
"""Settings in a picture with a line for each, the best first."""

WIDE = 5.3
"""Inches of a picture with names on its left."""


def name_of(setting: Setting) -> str:
    """Returns the short name of a setting."""
    return setting.label or setting.title


def height(lines: int) -> float:
    """Returns the inches of a picture with so many lines."""
    return 0.75 + 0.21 * lines


def name_lines(axis: Axes, names: Sequence[str]) -> None:
    """Writes a name beside each line, the first one at the top."""
    axis.set_yticks(range(len(names)), [short(name) for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)


def limited(comparison: Comparison) -> str:
    """Returns a sentence where a picture cannot have a line for every setting."""
    count = len(comparison.ranked)
    return f"The best {MOST_LINES} of {count:,} settings." if count > MOST_LINES else ""


def seeds(comparison: Comparison, canvas: Canvas) -> Section | None:
    """Draws the value of every seed, and the differences from the reference with their intervals."""
    ranked = comparison.ranked[:MOST_LINES]
    if len(comparison.ranked) < 2:
        return None
    metric, reference = comparison.metric, comparison.reference
    outside = comparison.outside
    lines = [*([outside] if outside is not None and outside.values(metric) else []), *ranked]
    text = [limited(comparison), "Thin ring: a seed. Bar: mean."]
    pictures = [
        canvas.picture(
            f"{metric.name} of every seed, by setting",
            lambda axis: _values(axis, lines, metric),
            (WIDE, height(len(lines))),
        )
    ]
    known = [(s, d) for s in ranked if (d := comparison.difference(s)) is not None]
    if known and reference is not None:
        pictures.append(_forest(canvas, comparison, reference, known))
        text.append(
            "Line: 95 % interval of the difference; full disc: told apart from the reference after Holm's "
            "correction (blue: better, orange: worse); open disc: not told apart."
        )
    return Section("Differences and seeds", text, pictures)


def _values(axis: Axes, settings: Sequence[Setting], metric: Metric) -> None:
    for place, setting in enumerate(settings):
        values = list(setting.values(metric).values())
        axis.plot(values, [place] * len(values), "o", color=GOOD, fillstyle="none", markersize=5)
        (mean,) = axis.plot([fmean(values)], [place], "|", color=INK, markersize=11, markeredgewidth=1.6)
        mean.set_gid(hint(f"{setting.title}: {fmean(values):.4f}, n = {len(values)}"))
    name_lines(axis, [f"{name_of(setting)}" for setting in settings])
    axis.set_xlabel(short(f"{metric.name} ({'higher' if metric.higher else 'lower'} is better)", 48))


def _forest(
    canvas: Canvas, comparison: Comparison, reference: Setting, known: Sequence[tuple[Setting, Difference]]
) -> Markup:
    metric = comparison.metric

    def draw(axis: Axes) -> None:
        axis.axvline(0, color=INK, linewidth=0.8)
        for place, (setting, difference) in enumerate(known):
            better = metric.sign * difference.estimate < 0
            color = (GOOD if better else BAD) if difference.told_apart else GREY
            mine, theirs = setting.values(metric), reference.values(metric)
            pairs = [mine[block] - theirs[block] for block in mine if block in theirs]
            if len(pairs) > 1:
                axis.plot(pairs, [place + 0.22] * len(pairs), ".", color=color, markersize=3.5, alpha=0.8)
            if not math.isnan(difference.low):
                axis.plot([difference.low, difference.high], [place, place], color=color, linewidth=1.8)
            fill = "full" if difference.told_apart else "none"
            (dot,) = axis.plot(
                [difference.estimate], [place], "o", color=color, fillstyle=fill, markersize=5.5
            )
            dot.set_gid(hint(f"{setting.title}: {signed(difference)}"))
        name_lines(axis, [name_of(setting) for setting, _ in known])
        axis.set_xlabel(short(f"{metric.name} minus {name_of(reference)}; dots: seeds", 56))

    label = f"differences from {reference.title} with 95 % intervals"
    return canvas.picture(label, draw, (WIDE, height(len(known))))
