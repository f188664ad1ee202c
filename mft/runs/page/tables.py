"""The tables of the report: settings ranked, and their differences by task in colours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

from mft.runs.comparison import Comparison
from mft.runs.multitask import COSTS as FRONTS
from mft.runs.multitask import MultiTask, losses_of
from mft.runs.page.differences import losses_beside, name_of, test_loss, test_tasks
from mft.runs.page.units import COSTS, number, percent
from mft.runs.results import Run
from mft.runs.settings import SEED, Metric, Setting
from mft.runs.statistics import Difference
from mft.runs.verdicts import p_text, signed, verdict

MOST_CELLS = 30_000
"""Of a table: what a browser on a phone sorts within a second, and about 1 MB."""

MOST_LINES = 100
"""Settings in the table of differences by task, the best first."""

MOST_COLUMNS = 60
"""Tasks in a table; of more, those with the highest loss."""

SHADES = 5
"""Of a colour, from pale to strong."""


class Cell(NamedTuple):
    """One cell. value: what it is sorted by, None: its text; hint: shown where the pointer rests."""

    text: str
    value: float | None = None
    css: str = ""
    hint: str = ""

    @property
    def key(self) -> str:
        """What it is sorted by, "" where that is its text."""
        return "" if self.value is None or PLAIN.fullmatch(self.text) else f"{self.value:.6g}"


PLAIN = re.compile(r"[-+]?\d+(\.\d+)?")
"""Text that a script reads as a number."""


class Head(NamedTuple):
    """The head of a column. group: what stands above it and its neighbours of the same group."""

    text: str
    hint: str = ""
    number: bool = True
    group: str = ""


@dataclass
class Table:
    """A table that can be sorted. fixed: rows that stay on top."""

    heads: list[Head] = field(default_factory=list)
    fixed: list[list[Cell]] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The titles above the heads, with their number of columns; [] without any."""
        found = [(title, len(list(heads))) for title, heads in groupby(self.heads, lambda head: head.group)]
        return found if any(title for title, _ in found) else []

    def without_empty(self) -> Table:
        """Returns the table without columns in which no row has anything."""
        rows = [*self.fixed, *self.rows]
        kept = [place for place in range(len(self.heads)) if any(row[place].text for row in rows)]
        fixed, shown = ([[row[i] for i in kept] for row in of] for of in (self.fixed, self.rows))
        return Table([self.heads[i] for i in kept], fixed, shown, self.note)


def ranked(comparison: Comparison, accounts: Sequence[MultiTask]) -> Table:
    """Returns all settings, the best first, with the baseline and the base model above them.

    accounts: what `multitask.multitask` returns.
    """
    columns = _Columns(comparison)
    table = Table(columns.heads())
    reference = comparison.reference
    if reference is not None and all(reference is not setting for setting in comparison.settings):
        table.fixed.append(columns.row(reference, "", None, "baseline"))
    for model, losses in comparison.base.items():
        table.fixed.append(columns.base(model, losses))
    shown = max(10, MOST_CELLS // len(table.heads))
    for rank, (setting, account) in enumerate(zip(comparison.settings, accounts, strict=True), start=1):
        if rank > shown:
            table.note = f"The best {shown:,} of {len(comparison.settings):,} settings."
            break
        place = str(rank) if setting.values(comparison.metric) else ""
        table.rows.append(columns.row(setting, place, account, verdict(comparison, setting)))
    if len(columns.tasks) < len(comparison.tasks):
        few = f"The {len(columns.tasks)} tasks with the highest loss of {len(comparison.tasks)}."
        table.note = f"{table.note} {few}".strip()
    return table.without_empty()


OVER_TASKS = "over the tasks"


class _Columns:
    """The columns of the ranked table, which are the same in every row."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        metrics, runs = comparison.metrics, comparison.runs
        self.keys = list(comparison.settings[0].keys) if comparison.settings else []
        self.tasks = table_tasks(comparison)
        taken = [metric.name for metric in metrics]
        # With one task its loss is the mean and the worst as well.
        several = len(comparison.tasks) > 1
        self.losses = [
            name for name in (*(["mean", "worst"] if several else []), *self.tasks) if name not in taken
        ]
        if not several and taken[0] in ("mean", "worst"):
            self.losses = [name for name in self.losses if name not in comparison.tasks]
        self.tested = test_tasks(comparison)
        self.costs = [name for name in COSTS if any(getattr(run, name) is not None for run in runs)]
        self.front = comparison.tasks if several else []

    def heads(self) -> list[Head]:
        metric, against = self.comparison.metric, _against(self.comparison)
        way, group = ("higher" if metric.higher else "lower"), metric.name
        heads = [Head("setting", "", False, "setting"), Head("rank", "", True, "setting")]
        heads += [Head(key, "", False, "setting") for key in self.keys]
        heads += [
            Head("n", "runs with a value", True, group),
            Head("mean ± spread", f"over seeds, standard deviation; {way} is better", True, group),
            Head("difference [95 %]", f"from {against}, paired by seed, with its interval", True, group),
            Head("p", "two-sided, after Holm's correction", True, group),
            Head("detectable", "smallest true difference told from zero in 4 of 5 cases", True, group),
            Head("verdict", "", False, group),
        ]
        heads += [Head(one.name, "", True, "further metrics") for one in self.comparison.metrics[1:]]
        heads += [Head(name, "", True, "validation loss") for name in self.losses]
        if self.tested:
            group = "test loss, never used to choose"
            over = f"mean over {len(self.tested)} tasks" if len(self.tested) > 1 else self.tested[0]
            heads += [
                Head(over, "", True, group),
                Head("gap", "test minus validation, same tasks", True, group),
            ]
            heads += [Head(task, "", True, group) for task in self.tested if len(self.tested) > 1]
        if self.front:
            saved = f"mean over tasks of the loss saved against {against}; higher is better"
            regret = "how far the task that is worst off lies behind the best setting on it"
            counts = f"tasks better, worse, and not told apart from {against}"
            front = "● no other setting is as good on every task and better on one"
            heads += [
                Head("Δm %", saved, True, OVER_TASKS),
                Head("regret %", regret, True, OVER_TASKS),
                Head("+ / − / ?", counts, True, OVER_TASKS),
                Head("front", front, False, OVER_TASKS),
            ]
        return heads + [Head(COSTS[name][0], _cost_hint(name), True, "cost of a run") for name in self.costs]

    def row(self, setting: Setting, rank: str, account: MultiTask | None, word: str) -> list[Cell]:
        comparison, metric = self.comparison, self.comparison.metric
        difference, mean = comparison.difference(setting), setting.mean(metric)
        spread, name = setting.spread(metric), name_of(setting)
        cells = [
            Cell(name, None, "", setting.title if setting.title != name else ""),
            Cell(rank),
            *(Cell(setting.keys.get(key, "")) for key in self.keys),
            Cell(str(len(setting.values(metric)))),
            Cell(f"{number(mean)} ± {number(spread)}" if spread is not None else number(mean), mean),
            *_difference_cells(difference),
            Cell(word, None, _verdict_css(comparison, difference)),
        ]
        cells += [_measured(setting.mean(one)) for one in comparison.metrics[1:]]
        cells += [_measured(setting.mean(Metric(loss))) for loss in self.losses]
        if self.tested:
            beside = losses_beside(setting, self.tested)
            cells += [_measured(beside[1]), _measured(beside[1] - beside[0])] if beside else [Cell("")] * 2
            losses = [test_loss(setting, task) for task in self.tested] if len(self.tested) > 1 else []
            cells += [_measured(loss) for loss in losses]
        if self.front:
            cells += _account_cells(account)
        for cost in self.costs:
            value = setting.cost(cost)
            front = account is not None and cost in account.cheap_front
            text = f"{COSTS[cost][1](value)}{' ●' if front else ''}"
            cells.append(Cell(text, value, "", "on the front of this cost and the metric" if front else ""))
        return cells

    def base(self, model: str, losses: Mapping[str, float]) -> list[Cell]:
        """Returns the row of the base model before any training."""
        known = [losses[task] for task in self.comparison.tasks if task in losses]
        whole = bool(known) and len(known) == len(self.comparison.tasks)
        of = {"mean": fmean(known), "worst": max(known), **losses} if whole else dict(losses)
        cells = [Cell(f"before training{f': {model}' if model else ''}"), Cell("")]
        cells += [Cell("")] * len(self.keys)
        cells += [
            Cell(""),
            _measured(of.get(self.comparison.metric.name)),
            *[Cell("")] * 3,
            Cell("base model"),
        ]
        cells += [_measured(of.get(one.name)) for one in self.comparison.metrics[1:]]
        cells += [_measured(of.get(loss)) for loss in self.losses]
        return cells + [Cell("")] * (len(self.heads()) - len(cells))


def by_task(comparison: Comparison) -> Table | None:
    """Returns the differences from the reference on each task, coloured; None where there is nothing to see.

    Shades are of the difference in per cent of the reference's loss, on one scale for all cells.
    """
    reference, tasks = comparison.reference, table_tasks(comparison)
    if reference is None or not tasks or len(comparison.settings) < 2:
        return None
    losses = losses_of(reference, tasks)
    shown = [
        (setting, found)
        for setting, found in zip(comparison.settings, comparison.by_task, strict=True)
        if setting is not reference and found
    ]
    if not shown:
        return None
    table = Table(heads=[Head("setting", "", False), *(Head(task) for task in tasks)])
    table.fixed = [[Cell(f"{name_of(reference)} (loss)"), *(_measured(losses.get(task)) for task in tasks)]]
    relative = [
        abs(d.estimate) / losses[task] for _, found in shown for task, d in found.items() if losses.get(task)
    ]
    # One wild setting must not leave all others pale.
    largest = sorted(relative)[int(0.95 * (len(relative) - 1))] if relative else 0.0
    for setting, found in shown[:MOST_LINES]:
        row = [Cell(name_of(setting), None, "", setting.title)]
        row += [_coloured(found.get(task), losses.get(task), largest) for task in tasks]
        table.rows.append(row)
    if len(shown) > MOST_LINES:
        table.note = f"The best {MOST_LINES} of {len(shown):,} settings."
    return table


def table_tasks(comparison: Comparison) -> list[str]:
    """Returns the tasks that have a column: all, or of very many those with the highest loss."""
    from mft.training.panels import most

    if len(comparison.tasks) <= MOST_COLUMNS:
        return comparison.tasks
    best = comparison.ranked[:20]
    highest = {task: max((s.mean(Metric(task)) for s in best), default=0.0) for task in comparison.tasks}
    return most(comparison.tasks, highest, MOST_COLUMNS)


def runs_table(runs: Sequence[Run], keys: Sequence[str], limit: int) -> Table:
    """Returns the values that differ, a row for each run."""
    heads = [Head(name, "", False) for name in ("run", "state", *keys)]
    if SEED not in keys:
        heads.append(Head(SEED))
    names = [head.text for head in heads[2:]]
    rows = [
        [
            Cell(run.name, None, "", run.where),
            Cell(run.state),
            *(Cell(run.values.get(key, "-")) for key in names),
        ]
        for run in runs[:limit]
    ]
    note = (
        f"The first {limit:,} of {len(runs):,} runs, by rank of their setting." if len(runs) > limit else ""
    )
    return Table(heads=heads, rows=rows, note=note)


def _against(comparison: Comparison) -> str:
    if comparison.baseline:
        return f"the baseline ({comparison.baseline})"
    return "the setting with the best mean"


def _measured(value: float | None) -> Cell:
    return Cell("") if value is None or math.isnan(value) else Cell(number(value), value)


def _difference_cells(difference: Difference | None) -> list[Cell]:
    if difference is None:
        return [Cell("")] * 3
    p = difference.adjusted_p
    about = f"{difference.seeds} paired seeds"
    if difference.rows:
        about += f", {difference.rows:,} paired validation rows"
    return [
        Cell(signed(difference), difference.estimate, "", about),
        Cell(p_text(p), None if math.isnan(p) else p),
        _measured(difference.detectable),
    ]


def _account_cells(account: MultiTask | None) -> list[Cell]:
    if account is None:
        return [Cell("")] * 4
    names = {"better": account.won, "worse": account.lost, "not told apart": account.undecided}
    said = "; ".join(f"{word}: {', '.join(tasks)}" for word, tasks in names.items() if tasks)
    won, lost, rest = len(account.won), len(account.lost), len(account.undecided)
    counts = Cell(f"{won} / {lost} / {rest}", won - lost, "", said) if won + lost + rest else Cell("")
    return [
        Cell(percent(account.delta_m), account.delta_m),
        Cell(
            "" if account.regret is None else f"{account.regret:.2f}", account.regret, "", account.regret_task
        ),
        counts,
        Cell("●" if account.on_front else ""),
    ]


def _verdict_css(comparison: Comparison, difference: Difference | None) -> str:
    if difference is None or not difference.told_apart:
        return ""
    return "good" if comparison.metric.sign * difference.estimate < 0 else "bad"


def _cost_hint(name: str) -> str:
    return f"mean over runs; ● no setting as good takes less {COSTS[name][0]}" if name in FRONTS else ""


def _coloured(difference: Difference | None, loss: float | None, largest: float) -> Cell:
    if difference is None:
        return Cell("")
    share = difference.estimate / loss if loss else 0.0
    shade = max(1, min(SHADES, math.ceil(SHADES * abs(share) / largest))) if largest and share else 0
    way = "b" if share < 0 else "w"
    css = "" if not shade else f"{way}{shade} sure" if difference.told_apart else f"{way}0 open"
    hint = f"{100 * share:+.2f} %; {signed(difference)}"
    p = p_text(difference.adjusted_p)
    hint += f"; p = {p} after Holm's correction over tasks" if p else ""
    return Cell(f"{difference.estimate:+.4f}", difference.estimate, css, hint)
