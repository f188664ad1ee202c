"""What may be said of a comparison, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mft.comparison.compare import Comparison
from mft.comparison.settings import Setting
from mft.comparison.statistics import Covers, Difference


def verdict(comparison: Comparison, setting: Setting) -> str:
    """Returns in a few words how a setting compares with the reference."""
    metric, difference = comparison.metric, comparison.difference(setting)
    if not setting.values(metric):
        return "no value"
    if setting is comparison.reference:
        return "baseline" if comparison.baseline else "highest" if metric.higher else "lowest"
    if difference is None:
        return "no seed in common"
    way = "higher" if difference.estimate > 0 else "lower"
    if difference.told_apart:
        return way
    if difference.seeds > 1:
        return "not told apart"
    apart = difference.low > 0 or difference.high < 0
    return f"one seed: {way} on these rows" if apart else "one seed: not told apart"


def sentence(comparison: Comparison) -> str:
    """Returns what may be said of all settings, in a sentence or two; a winner only where each is told apart."""
    ranked, higher = comparison.ranked, comparison.metric.higher
    best, better = ("highest", "higher") if higher else ("lowest", "lower")
    if not ranked:
        return "No run has a value of this metric yet."
    if comparison.baseline:
        return _of_baseline(comparison)
    if len(ranked) == 1:
        return "One setting only: nothing to compare it with."
    others = [comparison.difference(setting) for setting in ranked[1:]]
    if (winner := comparison.winner) is not None:
        next_one = others[0]
        assert next_one is not None
        how_sure = f"p = {p_text(next_one.adjusted_p)} after Holm's correction, {next_one.seeds} seeds"
        return (
            f"{winner.title} is {better} than all others: {by_how_much(next_one)} than the next, {how_sure}."
        )
    if all(other is None or other.seeds == 1 for other in others):
        hint = "Repeat with train.seed=1,2,3 to know how much seeds matter."
        return f"No winner: the {best} mean is of one seed (n = 1). {hint}"
    if comparison.ahead:
        are = "is" if len(comparison.ahead) == 1 else "are"
        return (
            f"No winner: in equal seeds {_listed(comparison.ahead)} {are} {better} than the {best} mean, "
            f"{ranked[0].title}."
        )
    near = sum(other is None or not other.told_apart for other in others)
    more = "one more is" if near == 1 else f"{near} more are"
    return f"No winner: {more} not told apart from the {best}.{_power(others)}"


def _of_baseline(comparison: Comparison) -> str:
    better, worse = "better", "worse"
    known = [(s, d) for s in comparison.ranked if (d := comparison.difference(s)) is not None]
    told = [(setting, d) for setting, d in known if d.told_apart]
    ahead = comparison.ahead
    baseline = f"than the baseline ({comparison.baseline})"
    if not told:
        what = f"No setting is told apart from the baseline ({comparison.baseline})."
        return what + _power([d for _, d in known])
    names = f": {_listed(ahead)}" if ahead else ""
    behind = f", {len(told) - len(ahead)} {worse}" if len(told) > len(ahead) else ""
    return f"{len(ahead)} of {len(known)} settings {better}{behind} {baseline}{names}."


def _listed(settings: Sequence[Setting], most: int = 3) -> str:
    names = ", ".join(setting.title for setting in settings[:most])
    return f"{names}{' and others' if len(settings) > most else ''}"


def _power(differences: Sequence[Difference | None]) -> str:
    """Returns a sentence on the smallest difference that could have been seen, "" where none is known."""
    known = [d.detectable for d in differences if d is not None and not math.isnan(d.detectable)]
    seen = "told in 4 of 5 such comparisons"
    return f" A difference of {min(known):.2g} would have been {seen}." if known else ""


def by_how_much(difference: Difference) -> str:
    """Returns the size of a difference, without its sign, with its interval."""
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return f"by {abs(difference.estimate):.4f} [{low:.4f}, {high:.4f}]"


def signed(difference: Difference | None) -> str:
    """Returns a difference with its interval: "+0.0120 [-0.0010, +0.0250]"; "" where there is none."""
    if difference is None:
        return ""
    if math.isnan(difference.low):
        return f"{difference.estimate:+.4f}"
    return f"{difference.estimate:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def p_text(p: float) -> str:
    """Returns a p for a table: 0.043, <0.001, or "" where there is none."""
    return "" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "<0.001"


def covered(differences: Sequence[Difference | None]) -> str:
    """Returns a sentence on what the intervals take into account."""
    kinds = {d.covers for d in differences if d is not None}
    sentences = {
        Covers.both: "Intervals (95 %) cover the choice of seeds and of validation rows.",
        Covers.seeds: "Intervals (95 %) cover the choice of seeds, on these validation rows.",
        Covers.rows: "With one seed, intervals (95 %) cover the choice of validation rows only.",
        Covers.nothing: "Without an interval: one seed, and the losses of single rows are not known.",
    }
    return " ".join(text for kind, text in sentences.items() if kind in kinds)
