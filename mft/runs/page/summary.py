"""The first screen: which setting, by how much, how sure, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mft.runs.comparison import Comparison
from mft.runs.multitask import MultiTask
from mft.runs.page.differences import losses_beside, name_of, test_tasks
from mft.runs.page.units import COSTS, number
from mft.runs.settings import Setting
from mft.runs.verdicts import covered, p_text, sentence, signed

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
    notes = [covered(comparison.differences), *comparison.notes, *unfinished(comparison)]
    best, other = _pair(comparison)
    tiles = [] if best is None else [_setting(comparison, best)]
    if best is not None and other is not None:
        tiles += [_difference(comparison, best, other), _cost(best, other)]
        tiles += _tasks(comparison, accounts, best, other)
    if best is not None:
        tiles += _test(comparison, best)
    return Summary(sentence(comparison), tiles, [note for note in notes if note])


def unfinished(comparison: Comparison) -> list[str]:
    """Returns a sentence on runs that may still change, or have seen less data than the others."""
    runs = [run for run in comparison.runs if run.state != "finished"]
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
    seeds = f"{len(values)} seeds" if len(values) > 1 else "1 seed"
    value = f"{number(best.mean(metric))}{f' ± {number(spread)}' if spread is not None else ''}"
    keys = [(key, value, "") for key, value in best.keys.items()]
    what = f"{'highest' if metric.higher else 'lowest'} {metric.name}: {value}, {seeds}"
    return Tile("Best setting", name_of(best), what, keys)


def _difference(comparison: Comparison, best: Setting, other: Setting) -> Tile:
    against = "baseline" if comparison.baseline else "next"
    known = comparison.difference(best if comparison.baseline else other)
    title = f"{against[0].upper()}{against[1:]} setting" if against == "next" else "Baseline"
    remark = f"{name_of(other)}: {number(other.mean(comparison.metric))}"
    if known is None:
        return Tile(title, "not comparable", f"{remark}; no seed in common")
    subject = "best minus baseline" if comparison.baseline else "next minus best"
    lines = [(subject, signed(known), "")]
    if p := p_text(known.adjusted_p):
        lines.append(("p after Holm's correction", p, ""))
    lines.append(("paired seeds", str(known.seeds), ""))
    if known.rows:
        lines.append(("paired validation rows", f"{known.rows:,}", ""))
    if detectable := number(known.detectable):
        lines.append(("detectable", detectable, "told in 4 of 5 such comparisons"))
    word = "told apart" if known.told_apart else "not told apart" if known.seeds > 1 else "one seed"
    return Tile(title, word, remark, lines)


def _cost(best: Setting, other: Setting) -> Tile:
    lines = []
    for name, (called, written) in COSTS.items():
        mine, theirs = best.cost(name), other.cost(name)
        if mine is None:
            continue
        ratio = f"{100 * (mine / theirs - 1):+.0f} %" if theirs else ""
        lines.append((called, written(mine), f"against {written(theirs)}: {ratio}" if ratio else ""))
    value = lines[0][1] if lines else "not recorded"
    return Tile("Cost of a run", value, f"against {name_of(other)}", lines)


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
    return [Tile("Task by task", f"{len(won)} better, {len(lost)} worse", f"than {name_of(other)}", lines)]


def _test(comparison: Comparison, best: Setting) -> list[Tile]:
    tasks = test_tasks(comparison)
    beside = losses_beside(best, tasks)
    if beside is None:
        return []
    valid, test = beside
    over = f"mean over {len(tasks)} tasks" if len(tasks) > 1 else "loss"
    lines = [("validation", number(valid), ""), ("gap", f"{test - valid:+.4f}", "")]
    return [Tile("Test", number(test), f"{over}; never used to choose", lines)]


def _named(tasks: Sequence[str]) -> str:
    more = f" and {len(tasks) - MOST_NAMED} more" if len(tasks) > MOST_NAMED else ""
    return ", ".join(tasks[:MOST_NAMED]) + more
