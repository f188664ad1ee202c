"""The report of a comparison: one HTML file with its pictures inside; no network, a small script to sort."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from mft import run_folder
from mft.comparison import compare_json
from mft.comparison.compare import Comparison, compare
from mft.comparison.differences import differing
from mft.comparison.effects import effects
from mft.comparison.multitask import multitask
from mft.comparison.page import (
    by_task,
    costs,
    curves,
    differences,
    facts,
    keys,
    ranked,
    search,
    summary,
    table,
    tested,
)
from mft.comparison.page.svg import THEMED, Canvas, Section
from mft.console.screen import shown
from mft.files.atomic import write_bytes
from mft.runs.folders import read_run
from mft.runs.results import Run
from mft.training.panels import cannot_draw

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_RUNS = 500
"""Runs in the table of what differs."""

MOST_COMMANDS = 600_000
"""Characters of all commands of a page."""

FOLDED = 6
"""Commands from which they are folded away."""


@dataclass
class Commands:
    """How the runs are repeated."""

    runs: list[Run]
    note: str
    folded: bool


def write(comparison: Comparison, path: Path) -> Path:
    """Writes the report; returns its file. Times, versions and commands are those of the runs."""
    accounts, runs = multitask(comparison), comparison.every_run
    style, script = _part("report.css"), _part("sort.js")
    page = _environment().from_string(_part("report.html"))
    from markupsafe import Markup

    text = page.render(
        title=comparison.title,
        over=comparison.paired_over,
        lead=_lead(comparison),
        summary=summary.summary(comparison, accounts),
        ranked=ranked.ranked(comparison, accounts),
        by_task=by_task.by_task(comparison),
        against=differences.name_of(comparison.reference) if comparison.reference else "",
        sections=sections(comparison),
        facts=facts.facts(comparison),
        runs=table.runs_table(runs, differing(runs), MOST_RUNS),
        commands=_commands(runs),
        # Both are of this package; all other text is escaped.
        style=Markup(style),
        script=Markup(script),
        hashes={"style": _hash(style), "script": _hash(script)},
    )
    write_bytes(path, text.encode(errors="backslashreplace"))
    return path


def leave_report(folder: Path) -> Path | None:
    """Writes `report.html` and compare.json of the runs in a sweep's folder; None where none has a result.

    Runs without one, as those that failed, are in them as well.
    """
    runs = [read_run(path) for path in run_folder.runs_under(folder)]
    if all(run.best("mean") is None for run in runs):
        return None
    comparison = compare(runs, folder.name)
    compare_json.write(comparison, folder / compare_json.FILE)
    return write(comparison, folder / "report.html")


def sections(comparison: Comparison) -> list[Section]:
    """Returns the pictures of a comparison that say something."""
    if why_not := cannot_draw():
        return [Section("Pictures", [f"{why_not[0].upper()}{why_not[1:]}."], [])]
    canvas = Canvas()
    found = effects(comparison)
    every = (
        differences.seeds(comparison, canvas),
        curves.learning(comparison, canvas),
        keys.main_effects(found, comparison, canvas),
        keys.heat(found[0], comparison, canvas),
        search.coordinates(found[0], comparison, canvas),
        costs.fronts(comparison, canvas),
        tested.tested(comparison, canvas),
        curves.weights(comparison, canvas),
        costs.resources(comparison, canvas),
    )
    return [section for section in every if section is not None]


def _lead(comparison: Comparison) -> str:
    metric = comparison.metric
    best = "highest" if metric.higher else "lowest"
    loss = metric.name in ("mean", "worst", "weighted", *comparison.tasks, *comparison.other_tasks)
    what = f"{best} {metric.name}{' validation loss' if loss else ''}"
    runs, settings = len(comparison.runs), len(comparison.settings)
    return (
        f"{runs:,} runs, {settings:,} settings, ranked by {metric.name}: each run's {what}, "
        f"mean over {comparison.paired_over}."
    )


def _commands(runs: Sequence[Run]) -> Commands:
    known, room = [], MOST_COMMANDS
    for run in (run for run in runs if run.command):
        room -= len(run.command) + len(run.where)
        if room < 0:
            break
        known.append(run)
    left = sum(bool(run.command) for run in runs) - len(known)
    note = (
        f"{left:,} further commands, of the settings ranked last: mft show RUN prints them." if left else ""
    )
    return Commands(known, note, len(known) > FOLDED)


def _environment() -> Environment:
    from jinja2 import Environment
    from markupsafe import Markup

    def safe(value: object) -> object:  # every expression of the page goes through it
        return value if isinstance(value, Markup) or not isinstance(value, str) else shown(value)

    result = Environment(autoescape=True, finalize=safe, trim_blocks=True)
    result.globals["themed"] = lambda color: THEMED.get(color.lower(), color)
    result.globals["dashes"] = lambda dash: " ".join(str(2.5 * float(part)) for part in dash.split())
    return result


def _part(name: str) -> str:
    return (resources.files("mft.comparison.page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Returns the hash by which the page's policy allows a style or a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
