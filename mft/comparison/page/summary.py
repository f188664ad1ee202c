"""The first screen: which setting, by how much, how sure, at what cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mft.comparison.compare import Comparison
from mft.comparison.multitask import MultiTask
from mft.comparison.notes import notes
from mft.comparison.page.differences import name_of
from mft.comparison.page.tested import losses_beside, test_tasks
from mft.comparison.page.units import COSTS, number
from mft.comparison.settings import Setting
from mft.comparison.verdicts import covered, decimals, incomparable, p_text, sentence

MOST_NAMED = 5
"""Names in a sentence."""


@dataclass
class Tile:
    """One answer. lines: (name, value, remark)."""

    title: str
    value: str
    remark: str = ""
    lines: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class Summary:
    """What the first screen says."""

    sentence: str
    tiles: list[Tile]
    notes: list[str]


def summary(comparison: Comparison, accounts: Sequence[MultiTask]) -> Summary:
    """Returns what the first screen says. accounts: what `multitask.multitask` returns."""
    kinds = covered(comparison.differences, comparison.paired_over)
    said = [kinds, *notes(comparison), *unfinished(comparison)]
    best, other = _pair(comparison)
    tiles = [] if best is None else [_setting(comparison, best)]
    if best is not None and other is not None:
        tiles += [_difference(comparison, best, other), _cost(best, other)]
        tiles += _tasks(comparison, accounts, best, other)
    return Summary(sentence(comparison), tiles, [note for note in said if note])


def unfinished(comparison: Comparison) -> list[str]:
    """Returns a sentence on runs that may still change, or have seen less data than the others."""
    runs = [run for run in comparison.every_run if run.state != "finished"]
    if not runs:
        return []
    names = ", ".join(f"{run.name} ({run.state})" for run in runs[:MOST_NAMED])
    more = f" and {len(runs) - MOST_NAMED:,} more" if len(runs) > MOST_NAMED else ""
    return [f"Not finished, and ranked by what they have: {names}{more}."]


def _pair(comparison: Comparison) -> tuple[Setting | None, Setting | None]:
    """Returns the setting that the first screen is about, and the one it is held against."""
    ranked, reference = comparison.ranked, comparison.reference
    if comparison.baseline:
        best = next((setting for setting in ranked if setting is not reference), None)
        return best, reference
    return (ranked[0] if ranked else None), (ranked[1] if len(ranked) > 1 else None)


def _setting(comparison: Comparison, best: Setting) -> Tile:
    metric = comparison.metric
    values, spread = best.values(metric), best.spread(metric)
    word = "seed" if comparison.paired_over == "seeds" else "pair"
    seeds = f"{len(values)} {word}s" if len(values) > 1 else f"1 {word}"
    value = f"{number(best.mean(metric))}{f' ± {number(spread)}' if spread is not None else ''}"
    keys = [(key, value, "") for key, value in best.keys.items()]
    what = f"{'highest' if metric.higher else 'lowest'} {metric.name}: {value}, {seeds}"
    return Tile("Best setting", name_of(best), what, keys + _test(comparison, best))


def _difference(comparison: Comparison, best: Setting, other: Setting) -> Tile:
    """Returns by how much the best setting differs from the other one, and how sure that is."""
    known = comparison.difference(best if comparison.baseline else other)
    title = "Against the baseline" if comparison.baseline else "Against the next"
    remark = f"{name_of(other)}: {number(other.mean(comparison.metric))}"
    if known is None:
        return Tile(title, "not comparable", f"{remark}; {incomparable(comparison)}")
    ends = known.estimate, known.low, known.high
    # Without a baseline, differences are those of the others from the best.
    estimate, low, high = ends if comparison.baseline else (0 - ends[0], 0 - ends[2], 0 - ends[1])
    lines, digits = [], decimals(known)
    if not math.isnan(low):
        lines.append(("95 % interval", f"{low:+.{digits}f} to {high:+.{digits}f}", ""))
    if p := p_text(known.adjusted_p):
        lines.append(("p after Holm", p, ""))
    seeds = comparison.paired_over == "seeds"
    lines.append(("paired seeds" if seeds else "pairs", str(known.seeds), ""))
    if known.rows:
        lines.append(("paired rows", f"{known.rows:,}", ""))
    if detectable := number(known.detectable):
        lines.append(("detectable", detectable, ""))
    sure = "told apart" if known.told_apart else "not told apart" if known.seeds > 1 else "one seed"
    by = f"{estimate:+.{digits}f}, {sure}" if estimate else "no difference"
    return Tile(title, by, remark, lines)


def _cost(best: Setting, other: Setting) -> Tile:
    lines = []
    for name, (called, written) in COSTS.items():
        mine, theirs = best.cost(name), other.cost(name)
        if mine is None:
            continue
        ratio = f"{100 * (mine / theirs - 1):+.0f} %" if theirs else ""
        remark = "" if not ratio else "the same" if ratio[1:] == "0 %" else f"{ratio} from {written(theirs)}"
        lines.append((called, written(mine), remark))
    value = lines[0][1] if lines else "not recorded"
    return Tile("Cost of a run", value, f"beside {name_of(other)}", lines)


def _tasks(
    comparison: Comparison, accounts: Sequence[MultiTask], best: Setting, other: Setting
) -> list[Tile]:
    if len(comparison.tasks) < 2:
        return []
    subject = best if comparison.baseline else other
    place = next(i for i, setting in enumerate(comparison.settings) if setting is subject)
    account = accounts[place]
    won, lost = account.won, account.lost
    if not comparison.baseline:  # the other one was compared with the best
        won, lost = lost, won
    lines = [
        (word, str(len(tasks)), _named(tasks))
        for word, tasks in (("better", won), ("worse", lost), ("not told apart", account.undecided))
    ]
    told = f"{len(won)} better, {len(lost)} worse" if won or lost else "none told apart"
    return [Tile("Task by task", told, f"than {name_of(other)}", lines)]


def _test(comparison: Comparison, best: Setting) -> list[tuple[str, str, str]]:
    tasks = test_tasks(comparison)
    beside = losses_beside(best, tasks)
    if beside is None:
        return []
    valid, test = beside
    over = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
    remark = f"{over}; {test - valid:+.4f} from validation; never used to choose"
    return [("test", number(test), remark)]


def _named(tasks: Sequence[str]) -> str:
    more = f" and {len(tasks) - MOST_NAMED} more" if len(tasks) > MOST_NAMED else ""
    return ", ".join(tasks[:MOST_NAMED]) + more
