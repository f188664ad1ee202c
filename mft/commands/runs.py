"""`mft runs`, `mft show`, `mft tracking sync`: what is on the disk, how it went, and sending what a tracker missed."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mft import run_folder
from mft.console.screen import console, say
from mft.errors import UserError, nearest
from mft.files.json_file import read_json
from mft.runs.results import Run, flat, read_run
from mft.sweep.folder import RECORD

ROOTS = ("outputs", "multirun")
"""Where runs are looked for when no folder is named."""


def found(args: Sequence[str]) -> list[Path]:
    """Returns the run folders in the named folders, else in ROOTS; UserError for a folder that is none."""
    for arg in args:
        if not Path(arg).is_dir():
            siblings = [path.name for path in Path(arg).parent.glob("*")]
            raise UserError(f"{arg} is not a folder{nearest(Path(arg).name, siblings) or '.'}")
    folders = [Path(arg) for arg in args] or [Path(root) for root in ROOTS if Path(root).is_dir()]
    return [run for folder in folders for run in run_folder.runs_under(folder)]


def runs(args: Sequence[str]) -> None:
    """mft runs [DIR …]: lists runs and sweeps (in outputs/ and multirun/) with state, age, best losses and folder.

    A sweep has one line; its jobs are listed by naming its folder.
    """
    if "-h" in args or "--help" in args:
        print(runs.__doc__)
        return
    from rich.table import Table
    from rich.text import Text

    folders = found(args)
    if not folders:
        print("no runs here")
        return
    named = {Path(arg).resolve() for arg in args}
    sweeps: dict[Path, list[Path]] = {}
    rows = []
    for folder in folders:
        inside = (folder.parent / RECORD).exists() and folder.parent.resolve() not in named
        sweeps.setdefault(folder.parent if inside else folder, []).append(folder)
    for folder, members in sweeps.items():
        rows.append(_run_row(folder) if members == [folder] else _sweep_row(folder, members))
    table = Table(title=f"{len(rows)} runs and sweeps", title_justify="left")
    for column in ("folder", "state", "age", "steps", "best", "of each task", "what"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    terminal = console()
    (terminal if terminal.is_terminal else console(width=180)).print(table)


def _run_row(folder: Path) -> list[str]:
    run, known = read_run(folder), read_json(folder / "overrides.json")
    step = max((int(row["step"]) for row in run.rows), default=0)
    total = read_json(folder / "plan.json").number("total_steps")
    what = known.text("label") or " ".join(known.texts("overrides"))
    return [
        os.path.relpath(folder),
        run.state,
        age([folder]),
        f"{step}/{'?' if total is None else total}",
        *_best(run),
        what,
    ]


def _sweep_row(folder: Path, members: Sequence[Path]) -> list[str]:
    """One line for all jobs: how many are in which state, and the best of them."""
    jobs = [read_run(member) for member in members]
    counts = Counter(job.state for job in jobs)
    state = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    judged = [(value, place) for place, job in enumerate(jobs) if (value := job.best("mean")) is not None]
    best = min(judged)[1] if judged else None
    label = "" if best is None else read_json(members[best] / "overrides.json").text("label")
    what = f"sweep of {len(jobs)} jobs" + (f", best: {label}" if label else "")
    return [os.path.relpath(folder), state, age(members), "", *(["", ""] if best is None else _best(jobs[best])), what]


def _best(run: Run) -> list[str]:
    """Returns the lowest mean of the tasks' validation losses, and the lowest of each task."""
    value = run.best("mean")
    by_task = [f"{task} {best:.3f}" for task in run.tasks if (best := run.best(task)) is not None]
    return ["" if value is None else f"{value:.4f}", " · ".join(by_task)]


def age(folders: Sequence[Path]) -> str:
    """Returns how long ago runs last wrote something."""
    names = ("metrics.jsonl", "summary.json", "identity.json")
    times = [(folder / name).stat().st_mtime for folder in folders for name in names if (folder / name).exists()]
    seconds = time.time() - max(times)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def show(args: Sequence[str]) -> None:
    """mft show RUN: prints a run's state and losses, what its config changes of the defaults, and where things are."""
    if not args or "-h" in args or "--help" in args:
        print(show.__doc__)
        return
    folder = Path(args[0])
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml (mft runs lists the runs).")
    from rich.text import Text

    from mft.console.tables import settings_table
    from mft.training.progress import losses_table

    run, summary = read_run(folder), read_json(folder / "summary.json")
    terminal = console(width=None if sys.stdout.isatty() else 140)
    seconds, memory = summary.number("seconds"), summary.number("peak_memory_gib")
    took = "" if seconds is None or memory is None else f", took {seconds:.0f} s and {memory:.1f} GiB at most"
    terminal.print(settings_table([("state", f"{run.state}, {_run_row(folder)[3]} steps{took}")], str(folder)))
    changed = [(key, Text.assemble(value, "  ", (default, "dim"))) for key, value, default in changes(run)]
    terminal.print(settings_table(changed, "changed from the defaults (dim: the default)"))
    prefix = "valid/loss/"
    first, last, best = (
        {
            key.removeprefix(prefix): math.inf if loss is None else float(loss)
            for key, loss in summary.part(part).items()
            if key.startswith(prefix) and (loss is None or isinstance(loss, int | float))
        }
        for part in ("first", "last", "best")
    )
    if last:
        terminal.print(losses_table(first, last, best, int(summary.part("best").number("step") or 0)))
    places = {
        "config": folder / "config.yaml",
        "metrics": folder / "metrics.jsonl",
        "model": folder / "final",
        "checkpoints": folder / "checkpoints",
        "pictures": folder / "report",
        "output": folder / "log" / "output.txt",
        "traceback": folder / "log" / "traceback.txt",
    }
    rows: list[tuple[str, object]] = [(name, path) for name, path in places.items() if path.exists()]
    rows += [("error", summary.text("error"))] if summary.text("error") else []
    terminal.print(settings_table([*rows, ("again", run.command)], "where things are"), soft_wrap=True)


def changes(run: Run) -> list[tuple[str, str, str]]:
    """Returns (key, value, default): the options taken, then values that are not those of the option that was taken."""
    from mft.config.compose import compose_resolved
    from mft.config.schema import plain

    def composed(overrides: Sequence[str]) -> dict[str, str]:
        return flat(plain(compose_resolved(overrides)))

    defaults = composed([])
    options = {k: v for k, v in run.values.items() if "." not in k and k in defaults and k not in ("task", "train")}
    taken = [(key, value, defaults[key]) for key, value in options.items() if value != defaults[key]]
    try:
        base = composed([f"{key}={value}" for key, value, _ in taken])
    except UserError:  # an option of the user's own folder, which is not known here
        base = defaults
    others = {k: v for k, v in run.values.items() if k not in options and not k.endswith("cache_dir")}
    given = [(k, v, base.get(k, "-")) for k, v in others.items() if base.get(k) != v]
    return [*taken, *given]


def tracking(args: Sequence[str]) -> None:
    """mft tracking sync [DIR …] [--uri ADDRESS]: sends what runs (in outputs/ and multirun/) recorded and their MLflow
    store has not received; a run that was killed by force is marked as failed. A resumed run continues as the same one.
    """
    if not args or "-h" in args or "--help" in args:
        print(tracking.__doc__)
        return
    if args[0] != "sync":
        raise UserError(f"mft tracking knows sync, not {args[0]!r}.")
    words, uri = list(args[1:]), ""
    if "--uri" in words:
        at = words.index("--uri")
        if at + 1 == len(words):
            raise UserError("--uri needs an address.")
        uri = words[at + 1]
        del words[at : at + 2]
    from mft.tracking.record import NAME
    from mft.tracking.sender import sync

    failures = []
    folders = found(words)
    sweeps = dict.fromkeys(folder.parent for folder in folders if (folder.parent / RECORD).exists())  # their reports
    tracked = [folder for folder in (*folders, *sweeps) if (folder / NAME).exists()]
    for folder in tracked:
        if run_folder.state(folder) == "running":
            say(f"{folder}: still running, it sends its metrics itself")
            continue
        try:
            count, killed = sync(folder, uri)
            say(f"{folder}: {count} points and files sent{', marked as failed' if killed else ''}")
        except UserError as error:
            failures.append(str(error))
    if not tracked:
        raise UserError("There is no run tracked by MLflow here.")
    if failures:
        raise UserError("\n".join(failures))
