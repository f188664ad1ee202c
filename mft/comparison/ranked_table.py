"""The ranked table of a comparison: for the terminal, as CSV, and for papers in Markdown and LaTeX."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

from mft.comparison.compare import Comparison
from mft.comparison.multitask import losses_of, multitask, over_tasks
from mft.comparison.settings import Metric, Setting
from mft.comparison.verdicts import p_text, signed, verdict
from mft.console.tables import Fitted, fitted
from mft.files.atomic import write_text

MOST_TASKS = 6
"""Tasks with a column in the terminal; the report and the files have all."""

PAPER = {"markdown": "pipe", "latex": "latex_booktabs"}
"""Formats for papers → tabulate's names of them."""

MARKUP = re.compile(r"[\\`*<|]|(?<=\])\(")
"""What would be more than text in a cell of Markdown: code, emphasis, tags, the end of the cell, links."""

FORMULA = re.compile(r"[=+@\t\r-].")
"""How a cell begins that a spreadsheet computes."""

NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")


def text_table(
    comparison: Comparison, most_tasks: int | None = None, short: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows as text.

    most_tasks: only so many tasks have columns; short: whether one column, with the short names of the
    settings, stands for those of the keys.
    """
    tasks = comparison.tasks[:most_tasks]
    metrics = [
        metric for metric in comparison.metrics if metric.name not in tasks or metric is comparison.metric
    ]
    tasks = [task for task in tasks if task != comparison.metric.name]
    tested = any(setting.test() for setting in comparison.settings)
    keys = list(comparison.settings[0].keys) if comparison.settings else []
    keys = ["setting"] if short and keys else keys
    head = ["rank", *keys, "n", *(metric.name for metric in metrics), "difference", "p", *tasks]
    head += [*(["test"] if tested else []), "seconds", "verdict"]
    rows = []
    for rank, setting in enumerate(comparison.settings, start=1):
        difference = comparison.difference(setting)
        place = str(rank) if setting.values(comparison.metric) else ""
        named = [setting.label] if short and keys else list(setting.keys.values())
        row = [place, *named, str(len(setting.values(comparison.metric)))]
        row += [with_spread(setting, metric) for metric in metrics]
        row += [signed(difference), p_text(difference.adjusted_p) if difference else ""]
        row += [_number(setting.mean(Metric(task))) for task in tasks]
        row += [_number(over_tasks(setting.test(), comparison.tasks).get("mean"))] if tested else []
        row += [_number(setting.cost("seconds"), ".0f"), verdict(comparison, setting)]
        rows.append(row)
    for model, losses in comparison.base.items():
        of = {**over_tasks(losses, comparison.tasks), **losses}
        of_metric = [of.get(metric.name) for metric in metrics]
        name = f"before training {model}".strip()
        row = ["", *([name] + [""] * (len(keys) - 1) if keys else []), "", *map(_number, of_metric), "", ""]
        row += [_number(losses.get(task)) for task in tasks]
        row += [*([""] if tested else []), "", "" if keys else name]
        rows.append(row)
    return head, rows


def fitted_table(comparison: Comparison, width: int) -> Fitted:
    """Returns the table for a terminal: what says least is left out where it has no room."""
    tasks = comparison.tasks[:MOST_TASKS]
    metrics = [metric.name for metric in comparison.metrics]
    others = [name for name in tasks if name not in metrics]
    spare = ("seconds", *reversed(others), "test", *reversed(metrics[1:]), "p", "difference")
    whole = {"rank", "n", "p", *metrics, *tasks, "test", "seconds"}
    full, short = (
        fitted(*text_table(comparison, MOST_TASKS, by_name), width, whole, spare) for by_name in (False, True)
    )
    # the values of many keys take the room of the numbers, which the names leave
    return full if full.whole_words and "difference" not in full.left_out else short


def with_spread(setting: Setting, metric: Metric) -> str:
    """Returns the mean of a setting, with the standard deviation between seeds where there are several."""
    spread = setting.spread(metric)
    return _number(setting.mean(metric)) + ("" if spread is None else f" ± {spread:.4f}")


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns one record for each setting, with everything that the page shows of it as plain numbers."""
    result = []
    for place, (setting, account) in enumerate(zip(comparison.settings, multitask(comparison), strict=True)):
        record: dict[str, Any] = {"rank": place + 1, **setting.keys}
        record["n"] = len(setting.values(comparison.metric))
        for metric in comparison.metrics:
            spread = "spread" if metric is comparison.metric else f"{metric.name} spread"
            record |= {metric.name: setting.mean(metric), spread: setting.spread(metric)}
        if difference := comparison.differences[place]:
            for name in ("low", "high", "p", "adjusted_p", "detectable", "covers"):
                record[name] = getattr(difference, name)
            record["difference"] = difference.estimate
        record.setdefault("worst", setting.mean(Metric("worst")))
        losses, test = losses_of(setting, comparison.tasks), setting.test()
        for task in comparison.tasks:
            record[task] = losses.get(task)
            if of_task := comparison.by_task[place].get(task):
                parts = {"difference": of_task.estimate, "low": of_task.low, "high": of_task.high}
                record |= {f"{task} {name}": value for name, value in parts.items()}
                record[f"{task} adjusted_p"] = of_task.adjusted_p
            if task in test:
                record[f"test {task}"] = test[task]
        record |= {"delta_m": account.delta_m, "regret": account.regret, "regret_task": account.regret_task}
        record |= {"won": len(account.won), "lost": len(account.lost), "undecided": len(account.undecided)}
        record |= {name: setting.cost(name) for name in ("seconds", "tokens", "flops")}
        record |= {"GiB": setting.cost("memory"), "verdict": verdict(comparison, setting)}
        result.append(record)
    return result


def write_csv(comparison: Comparison, path: Path) -> None:
    """Writes `records` as CSV, an empty cell for what is not known.

    Text that a spreadsheet would run as a formula begins with an apostrophe.
    """
    rows = records(comparison)
    columns = dict.fromkeys(name for row in rows for name in row)
    ends = (
        "delta_m",
        "regret",
        "regret_task",
        "won",
        "lost",
        "undecided",
        "seconds",
        "tokens",
        "flops",
        "GiB",
    )
    last = [name for name in (*ends, "verdict") if name in columns]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [*(name for name in columns if name not in last), *last]
        writer.writerow(map(_cell, names))
        writer.writerows([_cell(row.get(name)) for name in names] for row in rows)


def write_paper_table(comparison: Comparison, path: Path, kind: str) -> None:
    """Writes the table with all tasks; kind: one of `PAPER`."""
    from tabulate import tabulate

    head, rows = text_table(comparison)
    if kind == "markdown":  # tabulate escapes for LaTeX alone
        escaped = [[MARKUP.sub(r"\\\g<0>", cell.replace("\n", " ")) for cell in row] for row in [head, *rows]]
        head, rows = escaped[0], escaped[1:]
    text = tabulate(rows, head, tablefmt=PAPER[kind], disable_numparse=True)
    write_text(path, text + "\n")


def _number(value: float | None, spec: str = ".4f") -> str:
    return "" if value is None or math.isnan(value) else format(value, spec)


def _cell(value: Any) -> Any:
    if isinstance(value, str) and FORMULA.match(value) and not NUMBER.fullmatch(value):
        return f"'{value}"
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
