"""`mft runs`, `mft show`, `mft tracking sync`: what is on the disk, how it went, and sending what a tracker missed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from mft import rundir
from mft.errors import UserError, nearest

ROOTS = ("outputs", "multirun")
"""Where runs are looked for when no folder is named."""


def found(args: Sequence[str]) -> list[Path]:
    """Returns the run folders in the named folders, else in ROOTS; UserError for a folder that is none."""
    for arg in args:
        if not Path(arg).is_dir():
            siblings = [path.name for path in Path(arg).parent.glob("*")]
            raise UserError(f"{arg} is not a folder{nearest(Path(arg).name, siblings) or '.'}")
    folders = [Path(arg) for arg in args] or [Path(root) for root in ROOTS if Path(root).is_dir()]
    return [run for folder in folders for run in rundir.runs_under(folder)]


def runs(args: Sequence[str]) -> None:
    """mft runs [DIR …]: lists runs and the jobs of sweeps (in outputs/ and multirun/) with state, age and best loss."""
    if "-h" in args or "--help" in args:
        print(runs.__doc__)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mft.results import read_run

    folders = found(args)
    if not folders:
        print("no runs here")
        return
    table = Table(title=f"{len(folders)} runs", title_justify="left")
    for column in ("folder", "state", "age", "steps", "best", "what"):
        table.add_column(column, overflow="fold")
    for folder in folders:
        run, known = read_run(folder), rundir.read_json(folder / "overrides.json")
        best = run.best("mean")
        step = max((int(row["step"]) for row in run.rows), default=0)
        total = rundir.read_json(folder / "plan.json").get("total_steps", "?")
        what = known.get("label") or " ".join(known.get("overrides", []))
        row = [os.path.relpath(folder), run.state, age(folder), f"{step}/{total}", f"{best:.4f}" if best else "", what]
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=180)).print(table)


def age(folder: Path) -> str:
    """Returns how long ago a run last wrote something."""
    files = [folder / name for name in ("metrics.jsonl", "summary.json", "identity.json")]
    seconds = time.time() - max(file.stat().st_mtime for file in files if file.exists())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def show(args: Sequence[str]) -> None:
    """mft show RUN: prints a run's state, what its config changes of the defaults, its losses, and where things are."""
    if not args or "-h" in args or "--help" in args:
        print(show.__doc__)
        return
    folder = Path(args[0])
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml (mft runs lists the runs).")
    from rich.console import Console

    from mft.compose import compose_resolved
    from mft.progress import losses_table, settings_table
    from mft.results import flat, read_run
    from mft.run import plain

    run = read_run(folder)
    console = Console(highlight=False, markup=True)
    defaults = flat(plain(compose_resolved([])))
    changed = [(k, f"{v}  (default {defaults.get(k, '-')})") for k, v in run.values.items() if defaults.get(k) != v]
    console.print(settings_table(changed, "changed from the defaults"))
    summary = rundir.read_json(folder / "summary.json")
    prefix = "valid/loss/"
    first, last, best = (
        {k.removeprefix(prefix): v for k, v in summary.get(part, {}).items() if k.startswith(prefix)}
        for part in ("first", "last", "best")
    )
    if last:
        console.print(losses_table(first, last, best, summary["best"].get("step", 0)))
    rows = [("state", run.state), ("command", run.command), ("config", folder / "config.yaml")]
    rows += [(name, summary[key]) for name, key in (("final", "final"), ("error", "error")) if summary.get(key)]
    rows += [("output", p) for p in [folder / "log" / "output.txt"] if p.exists()]
    rows += [("pictures", folder / "report")] if (folder / "report").exists() else []
    console.print(settings_table([(a, str(b).replace("[", "\\[")) for a, b in rows], str(folder)), soft_wrap=True)


def tracking(args: Sequence[str]) -> None:
    """mft tracking sync [DIR …] [--uri ADDRESS]: sends what runs (in outputs/ and multirun/) recorded and their MLflow
    store has not received; a run that was killed by force is marked as failed. A resumed run goes on as the same one.
    """
    if not args or "-h" in args or "--help" in args:
        print(tracking.__doc__)
        return
    if args[0] != "sync":
        raise UserError(f"mft tracking knows sync, not {args[0]!r}.")
    words, uri = list(args[1:]), None
    if "--uri" in words:
        at = words.index("--uri")
        if at + 1 == len(words):
            raise UserError("--uri needs an address.")
        uri = words[at + 1]
        del words[at : at + 2]
    from mft.tracking.delivery import mark_killed, sync

    failures = []
    spooled = [folder for folder in found(words) if (folder / "mlflow.spool.jsonl").exists()]
    for folder in spooled:
        state = rundir.state(folder)
        if state == "running":
            print(f"{folder}: still running, it sends its record itself")
            continue
        try:
            killed = state != "finished" and mark_killed(folder)
            print(f"{folder}: {sync(folder, uri)} records and files sent{', marked as failed' if killed else ''}")
        except UserError as error:
            failures.append(str(error))
    if not spooled:
        raise UserError("There is no run tracked by MLflow here.")
    if failures:
        raise UserError("\n".join(failures))
