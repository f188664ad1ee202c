"""The range of a number, declared with its field, and the one check of all of them.

A field says what it takes in its metadata: `min`, `max` (inclusive), `above`, `below` (exclusive). Without any,
a number must be finite and fit into 64 bits, since no setting means anything beyond.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mft.errors import UserError, shortened

LARGEST = 2**63 - 1
"""What counters, seeds and offsets hold."""

BOUNDS = {
    "min": ("at least", lambda value, bound: value >= bound),
    "above": ("greater than", lambda value, bound: value > bound),
    "max": ("at most", lambda value, bound: value <= bound),
    "below": ("less than", lambda value, bound: value < bound),
}
"""Name in the metadata → how it reads, and the comparison; in the order in which a sentence names them."""


def ranged(default: Any, **bounds: float) -> Any:
    """Returns a dataclass field with this default and range, e.g. `rank: int = ranged(16, min=1)`."""
    return dataclasses.field(default=default, metadata=bounds)


def check_ranges(settings: Any, path: str) -> None:
    """Raises UserError for the first number of a dataclass outside its range; path: where it stands in the config."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not _within(value, field.metadata):
            null = ", or null" if "None" in str(field.type) or "Optional" in str(field.type) else ""
            shown = shortened(value, 40)
            raise UserError(f"{path}.{field.name}={shown} must be {_described(value, field.metadata)}{null}.")


def _within(value: float, bounds: Mapping[str, float]) -> bool:
    if isinstance(value, int) and abs(value) > LARGEST:
        return False
    return math.isfinite(value) and all(BOUNDS[name][1](value, bound) for name, bound in bounds.items())


def _described(value: float, bounds: Mapping[str, float]) -> str:
    """Returns "at least 0 and less than 1"; of a number that nothing takes also that it must be finite, or smaller."""
    if not math.isfinite(value):
        return " and ".join([*_listed(bounds), "finite"])
    too_large = isinstance(value, int) and value > LARGEST and not {"max", "below"} & set(bounds)
    listed = _listed({**bounds, "max": LARGEST} if too_large else bounds)
    return " and ".join(listed) or f"between -{LARGEST} and {LARGEST}"


def _listed(bounds: Mapping[str, float]) -> list[str]:
    return [f"{words} {bounds[name]}" for name, (words, _) in BOUNDS.items() if name in bounds]
