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
        return incomparable(comparison)
    way = "higher" if difference.estimate > 0 else "lower"
    if difference.told_apart:
        return way
    if difference.seeds > 1:
        return "not told apart"
    apart = difference.low > 0 or difference.high < 0
    return f"one seed: {way} on these rows" if apart else "one seed: not told apart"


def incomparable(comparison: Comparison) -> str:
    """Returns why a setting with a value has no difference from the reference."""
    reference = comparison.reference
    without = reference is not None and not reference.values(comparison.metric)
    return "baseline without a value" if without else "no seed in common"


def sentence(comparison: Comparison) -> str:
    """Returns what may be said of all settings in a sentence or two; a winner only if each is told apart."""
    ranked, higher = comparison.ranked, comparison.metric.higher
    best, better = ("highest", "higher") if higher else ("lowest", "lower")
    if not ranked:
        return "No run has a value of this metric yet."
    if comparison.baseline:
        return _of_baseline(comparison)
    if len(ranked) == 1:
        few = "One setting only" if len(comparison.settings) == 1 else "Only one setting has a value"
        return f"{few}: nothing to compare it with."
    others = [comparison.difference(setting) for setting in ranked[1:]]
    if (winner := comparison.winner) is not None:
        next_one = others[0]
        assert next_one is not None
        pairs = "seeds" if comparison.paired_over == "seeds" else "pairs"
        how_sure = f"p = {p_text(next_one.adjusted_p)} after Holm's correction, {next_one.seeds} {pairs}"
        return (
            f"{winner.title} is {better} than all others: {by_how_much(next_one)} than the next, {how_sure}."
        )
    if all(other is None or other.seeds == 1 for other in others):
        hint = "Repeat with train.seed=1,2,3 to know how much seeds matter."
        if len(ranked[0].values(comparison.metric)) == 1:
            return f"No winner: the {best} mean is of one seed (n = 1). {hint}"
        return f"No winner: no other setting has two seeds in common with the {best}. {hint}"
    if ahead := [
        s.title for s, d in zip(ranked[1:], others, strict=True) if _told(comparison, d, better=True)
    ]:
        is_ = "is" if len(ahead) == 1 else "are"
        return (
            f"No winner: {ranked[0].title} has the {best} mean, but {_some(ahead)} {is_} {better} in pairs "
            "with it, of the same seeds and validation rows."
        )
    near = sum(other is None or not other.told_apart for other in others)
    more = "one more is" if near == 1 else f"{near} more are"
    return f"No winner: {more} not told apart from the {best}.{_power(others)}"


def _told(comparison: Comparison, difference: Difference | None, better: bool) -> bool:
    """Whether a setting is told apart from the reference, and better (or worse) than it."""
    if difference is None or not difference.told_apart:
        return False
    return (comparison.metric.sign * difference.estimate < 0) == better


def _some(titles: Sequence[str]) -> str:
    return f"{', '.join(titles[:3])}{' and others' if len(titles) > 3 else ''}"


def _of_baseline(comparison: Comparison) -> str:
    baseline, reference = f"the baseline ({comparison.baseline})", comparison.reference
    others = [setting for setting in comparison.ranked if setting is not reference]
    known = [(s, d) for s in others if (d := comparison.difference(s)) is not None]
    if not known:
        if reference is not None and not reference.values(comparison.metric):
            return f"Nothing to compare with: {baseline} has no value of {comparison.metric.name}."
        if not others:
            return f"No other setting than {baseline} has a value of {comparison.metric.name}."
        return f"No setting that has a value has a seed in common with {baseline}."
    ahead = [s.title for s, d in known if _told(comparison, d, better=True)]
    worse = sum(_told(comparison, d, better=False) for _, d in known)
    apart = len(others) - len(known)
    left = f" {apart} without a seed in common with it." if apart else ""
    if not ahead and not worse:
        return f"No setting is told apart from {baseline}.{_power([d for _, d in known])}{left}"
    names = f": {_some(ahead)}" if ahead else ""
    behind = f", {worse} worse" if worse else ""
    return f"{len(ahead)} of {len(known)} settings better{behind} than {baseline}{names}.{left}"


def _power(differences: Sequence[Difference | None]) -> str:
    """Returns a sentence on what could have been seen of those not told apart, "" where that is not known."""
    open_ = [d.detectable for d in differences if d is not None and not d.told_apart]
    known = [value for value in open_ if not math.isnan(value)]
    if not known:
        return ""
    least, most = f"{min(known):.2g}", f"{max(known):.2g}"
    size = least if least == most else f"{least} to {most}, by setting,"
    return f" A difference of {size} would have been told in 4 of 5 such comparisons."


def by_how_much(difference: Difference) -> str:
    """Returns the size of a difference, without its sign, with its interval."""
    low, high = sorted((abs(difference.low), abs(difference.high)))
    digits = decimals(difference)
    return f"by {abs(difference.estimate):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def decimals(difference: Difference) -> int:
    """Returns how many decimals a difference and its interval are written with: 4, more where small."""
    ends = (difference.estimate, difference.low, difference.high)
    size = max(abs(end) for end in ends if not math.isnan(end))
    return 4 if size >= 0.001 or size == 0 else min(12, 2 - math.floor(math.log10(size)))


def signed(difference: Difference | None) -> str:
    """Returns a difference with its interval: "+0.0120 [-0.0010, +0.0250]"; "" where there is none."""
    if difference is None:
        return ""
    digits = decimals(difference)
    if math.isnan(difference.low):
        return f"{difference.estimate:+.{digits}f}"
    return f"{difference.estimate:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def p_text(p: float) -> str:
    """Returns a p for a table: 0.043, <0.001, or "" where there is none."""
    return "" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "<0.001"


def covered(differences: Sequence[Difference | None], paired_over: str = "seeds") -> str:
    """Returns a sentence on what the intervals take into account. paired_over: see `Comparison`."""
    kinds = {d.covers for d in differences if d is not None}
    sentences = {
        Covers.both: f"Intervals (95 %) cover the choice of {paired_over} and of validation rows.",
        Covers.seeds: f"Intervals (95 %) cover the choice of {paired_over}, on these validation rows.",
        Covers.rows: "With one seed, intervals (95 %) cover the choice of validation rows only.",
        Covers.nothing: "Without an interval: one seed, and the losses of single rows are not known.",
    }
    return " ".join(text for kind, text in sentences.items() if kind in kinds)
