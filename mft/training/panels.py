"""Figures of equal panels and their colours, for the plots of runs and of sweeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Color = str | tuple[float, float, float, float]

# Okabe and Ito: distinguishable for the colour-blind and in grey; yellow, invisible as a line, left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


MOST = 24
"""Panels of a figure, and named lines of a panel: what one can look through, drawn within seconds."""


def cannot_draw() -> str:
    """Returns why no picture can be drawn, "" where one can: a bare machine may lack matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return f"no pictures are drawn, since matplotlib cannot be imported: {error}"
    return ""


def most(names: Sequence[str], rank: Mapping[str, float], room: int = MOST) -> list[str]:
    """Returns the `room` names with the highest rank, in their own order; those without a rank come last."""
    if len(names) <= room:
        return list(names)
    chosen = set(sorted(names, key=lambda name: rank.get(name, -math.inf), reverse=True)[:room])
    return [name for name in names if name in chosen]


def color_of(name: str, names: Sequence[str]) -> Color:
    """Returns the colour of a name among all that are drawn; a name that is none of them is grey."""
    if name not in names:
        return "#444444"
    if len(names) <= len(COLORS):
        return COLORS[names.index(name)]
    import matplotlib

    return matplotlib.colormaps["turbo"](0.05 + 0.9 * names.index(name) / (len(names) - 1))


def panel_grid(count: int, title: str, size: tuple[float, float] = (4.2, 3.0)) -> tuple[Figure, list[Axes]]:
    """Returns a figure with so many panels under a title; size: of one panel, in inches."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with anybody

    columns = min(count, min((4, 3), key=lambda width: -count % width))  # whichever leaves fewer places empty
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * lines + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(count)]
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", integer=True, nbins=6)
    return figure, axes


def label_axes(axes: Sequence[Axes], unit: str) -> None:
    """Writes what is drawn against what: the unit over optimizer steps."""
    for axis in axes:
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.set_ylabel(unit, fontsize=8)
        axis.margins(y=0.12)
