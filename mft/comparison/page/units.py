"""Numbers as a reader has them: losses, durations, counts."""

from __future__ import annotations

import math

UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | None) -> str:
    """Returns a loss or another metric with 4 decimals, more digits where small; "" for None and NaN."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """Returns 8.2 s, 83 s, 14 min or 3.1 h; "" for None."""
    if value is None:
        return ""
    if value < 10:
        return f"{value:.1f} s"
    return (
        f"{value:.0f} s"
        if value < 600
        else f"{value / 60:.0f} min"
        if value < 7200
        else f"{value / 3600:.1f} h"
    )


def count(value: float | None) -> str:
    """Returns 830, 1.24 M or 3.1 P; "" for None."""
    if value is None:
        return ""
    for size, letter in UNITS:
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"


def gib(value: float | None) -> str:
    """Returns 12.34 GiB; "" for None."""
    return "" if value is None else f"{value:.2f} GiB"


def percent(value: float | None) -> str:
    """Returns +1.23 %; "" for None."""
    return "" if value is None else f"{value:+.2f} %"


COSTS = {
    "seconds": ("time", seconds),
    "tokens": ("tokens", count),
    "flops": ("FLOPs", count),
    "memory": ("peak memory", gib),
}
"""What a run costs, as attributes of `Run` → its name, and how it is written."""
