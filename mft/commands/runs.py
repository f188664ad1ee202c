"""List runs and sweeps (in outputs/ and multirun/, or in DIR) with state, age, best losses and folder.

A sweep has one line; its jobs are listed by naming its folder.

examples:
  mft runs
  mft runs multirun/demo/…                                  the jobs of one sweep
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mft import run_folder
from mft.commands.arguments import Parser, existing_folder
from mft.console.screen import console
from mft.console.tables import fitted, table
from mft.files.json_file import read_json
from mft.runs.folders import read_run
from mft.runs.results import Run
from mft.sweep.folder import RECORD

ROOTS = ("outputs", "multirun")
"""Where runs are looked for when no folder is named."""

WRITTEN_BY_RUNS = ("metrics.jsonl", "summary.json", "identity.json")
"""Files of a run folder whose times tell when it last wrote something."""

COLUMNS = ("folder", "state", "age", "steps", "best", "of each task", "changed")


SPARE = ("of each task", "steps", "age", "changed")
"""Columns that a narrow terminal does without, the first one first."""


def parser() -> Parser:
    """Returns the command line of `mft runs`."""
    return Parser("runs", "[DIR …]", __doc__)


def run_folders(places: Sequence[str]) -> list[Path]:
    """Returns the run folders in the named folders, else in ROOTS; UserError for what is not a folder."""
    named = [existing_folder(place) for place in places]
    folders = named or [Path(root) for root in ROOTS if Path(root).is_dir()]
    return [run for folder in folders for run in run_folder.runs_under(folder)]


def command(arguments: Sequence[str]) -> None:
    """Prints the table."""
    places = parser().parse(arguments).words
    folders = run_folders(places)
    if not folders:
        print("no runs here")
        return
    named = {Path(place).resolve() for place in places}
    sweeps: dict[Path, list[Path]] = {}
    for folder in folders:
        # The jobs of a sweep share one line, unless the sweep itself was named.
        in_sweep = (folder.parent / RECORD).exists() and folder.parent.resolve() not in named
        sweeps.setdefault(folder.parent if in_sweep else folder, []).append(folder)
    rows = [run_row(path) if jobs == [path] else sweep_row(path, jobs) for path, jobs in sweeps.items()]
    screen = console()
    # a folder is pasted into other commands
    shown = fitted(COLUMNS, rows, screen.width, ("folder", "age", "steps", "best"), SPARE)
    screen.print(table(f"runs and sweeps: {len(rows)}", shown.columns, shown.rows, widths=shown.widths))


def run_row(folder: Path) -> list[str]:
    """Returns the cells of one run."""
    run, record = read_run(folder), read_json(folder / "overrides.json")
    changed = record.text("label") or " ".join(record.texts("overrides"))
    return [os.path.relpath(folder), run.state, age([folder]), steps(run, folder), *best_losses(run), changed]


def steps(run: Run, folder: Path) -> str:
    """Returns how far a run has come: "6/20", the total as its plan has it."""
    step = max((int(row["step"]) for row in run.rows), default=0)
    total = read_json(folder / "plan.json").number("total_steps")
    return f"{step}/{'?' if total is None else total}"


def sweep_row(folder: Path, members: Sequence[Path]) -> list[str]:
    """Returns the cells of a sweep: how many jobs are in which state, and the best of them."""
    jobs = [read_run(member) for member in members]
    counts = Counter(job.state for job in jobs)
    state = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    validated = [(value, i) for i, job in enumerate(jobs) if (value := job.best("mean")) is not None]
    best = min(validated)[1] if validated else None
    label = "" if best is None else read_json(members[best] / "overrides.json").text("label")
    changed = f"sweep of {len(jobs)} jobs" + (f", best: {label}" if label else "")
    losses = ["", ""] if best is None else best_losses(jobs[best])
    return [os.path.relpath(folder), state, age(members), "", *losses, changed]


def best_losses(run: Run) -> list[str]:
    """Returns the lowest mean of the tasks' validation losses, and the lowest of each task."""
    value = run.best("mean")
    by_task = [f"{task} {best:.3f}" for task in run.tasks if (best := run.best(task)) is not None]
    return ["" if value is None else f"{value:.4f}", " · ".join(by_task)]


def age(folders: Sequence[Path]) -> str:
    """Returns how long ago runs last wrote something."""
    files = [folder / name for folder in folders for name in WRITTEN_BY_RUNS]
    # Not the time of the folder: removing an old checkpoint changes that.
    seconds = time.time() - max(file.stat().st_mtime for file in files if file.exists())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
