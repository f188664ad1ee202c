"""The ranked table: all that is known of each setting, the best first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mft.comparison.compare import Comparison
from mft.comparison.multitask import COSTS as FRONTS
from mft.comparison.multitask import MultiTask, over_tasks
from mft.comparison.page.differences import name_of
from mft.comparison.page.table import Cell, Head, Table
from mft.comparison.page.tested import losses_beside, test_tasks
from mft.comparison.page.units import COSTS, number, percent
from mft.comparison.settings import Metric, Setting
from mft.comparison.statistics import Difference
from mft.comparison.verdicts import p_text, signed, verdict
from mft.training.panels import most

MOST_CELLS = 30_000
"""Of the table: what a browser on a phone sorts within a second, and about 1 MB."""

MOST_COLUMNS = 60
"""Tasks in a table; of more, those with the highest loss."""


def ranked(comparison: Comparison, accounts: Sequence[MultiTask]) -> Table:
    """Returns all settings, the best first, with the baseline and the base model above them.

    accounts: what `multitask.multitask` returns.
    """
    columns = _Columns(comparison)
    table = Table(columns.heads())
    if comparison.outside is not None:
        table.fixed.append(columns.row(comparison.outside, "", None, "baseline"))
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
        over = self.comparison.paired_over
        heads = [Head("setting", "", False, "setting"), Head("rank", "", True, "setting")]
        heads += [Head(key, "", False, "setting") for key in self.keys]
        heads += [
            Head("n", f"{over} with a value", True, group),
            Head("mean ± spread", f"over {over}, standard deviation; {way} is better", True, group),
            Head("difference [95 %]", f"from {against}, in pairs, with its interval", True, group),
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
                Head("gap", "test minus validation, of the same tasks and runs", True, group),
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
        cells += [measured(setting.mean(one)) for one in comparison.metrics[1:]]
        cells += [measured(setting.mean(Metric(loss))) for loss in self.losses]
        if self.tested:
            beside = losses_beside(setting, self.tested)
            cells += [measured(beside[1]), measured(beside[1] - beside[0])] if beside else [Cell("")] * 2
            losses = setting.test()
            cells += [measured(losses.get(task)) for task in self.tested if len(self.tested) > 1]
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
        of = {**over_tasks(losses, self.comparison.tasks), **losses}
        cells = [Cell(f"before training{f': {model}' if model else ''}"), Cell("")]
        cells += [Cell("")] * len(self.keys)
        cells += [
            Cell(""),
            measured(of.get(self.comparison.metric.name)),
            *[Cell("")] * 3,
            Cell("base model"),
        ]
        cells += [measured(of.get(one.name)) for one in self.comparison.metrics[1:]]
        cells += [measured(of.get(loss)) for loss in self.losses]
        return cells + [Cell("")] * (len(self.heads()) - len(cells))


def _against(comparison: Comparison) -> str:
    if comparison.baseline:
        return f"the baseline ({comparison.baseline})"
    return "the setting with the best mean"


def measured(value: float | None) -> Cell:
    """Returns the cell of a loss or another metric, empty for None and NaN."""
    return Cell("") if value is None or math.isnan(value) else Cell(number(value), value)


def _difference_cells(difference: Difference | None) -> list[Cell]:
    if difference is None:
        return [Cell("")] * 3
    p = difference.adjusted_p
    about = "1 pair" if difference.seeds == 1 else f"{difference.seeds} pairs"
    if difference.rows:
        about += f", {difference.rows:,} paired validation rows"
    return [
        Cell(signed(difference), difference.estimate, "", about),
        Cell(p_text(p), None if math.isnan(p) else p),
        measured(difference.detectable),
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


def table_tasks(comparison: Comparison) -> list[str]:
    """Returns the tasks that have a column: all, or of very many those with the highest loss."""
    if len(comparison.tasks) <= MOST_COLUMNS:
        return comparison.tasks
    best = comparison.ranked[:20]
    highest = {task: max((s.mean(Metric(task)) for s in best), default=0.0) for task in comparison.tasks}
    return most(comparison.tasks, highest, MOST_COLUMNS)
