"""What a person sees of a sweep: one line a job while it runs, a table at its end, and jobs.txt beside the jobs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mft.console.screen import console as new_console
from mft.console.screen import say as say_line
from mft.sweep.pool import Task

STYLE = {"finished": "green", "skipped": "green", "failed": "red", "stopped": "yellow", "pruned": "yellow"}
BAR = 12
"""Characters of a running job's bar."""

SAID = {"skipped": "finished before", "same": "same as an earlier job", "waiting": "not started"}


def say(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    say_line(line)


def shown(path: Path) -> str:
    """Returns a path as seen from here."""
    return os.path.relpath(path)


def plan(tasks: Sequence[Task], folder: Path) -> None:
    """Prints what a sweep would do."""
    from mft import run_folder
    from mft.training.checkpoint import newest

    say(f"sweep {shown(folder)}: {len(tasks)} jobs")
    for task in tasks:
        todo = SAID.get(task.state, task.state)
        if task.state == "waiting":
            checkpoint = newest(task.folder)
            before = run_folder.state(task.folder) if task.folder.exists() else ""
            todo = "would run" if checkpoint is None else f"would go on from {checkpoint.name}"
            todo = "is running in another process" if before == "running" else todo
            todo += " (failed before)" if before == "failed" else ""
        say(f"{task.number:>4}  {task.folder.name}  {todo:<32}  {task.job.label}")
    waiting = sum(task.state == "waiting" for task in tasks)
    say(f"{waiting} of {len(tasks)} jobs would run; nothing was started")


def start(tasks: Sequence[Task], folder: Path) -> None:
    """Prints the sweep's folder and how much is left, and writes jobs.txt."""
    waiting = sum(task.state == "waiting" for task in tasks)
    done = f", {len(tasks) - waiting} of them done" if waiting < len(tasks) else ""
    say(f"sweep {shown(folder)}: {len(tasks)} jobs{done}")
    write_jobs(tasks, folder)


def write_jobs(tasks: Sequence[Task], folder: Path) -> None:
    """Writes jobs.txt: folder, state, best objective and overrides of every job, those of earlier commands as well."""
    path = folder / "jobs.txt"
    kept = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else ():
        kept[line.split()[0]] = line
    for task in tasks:
        if task.state != "same":
            best = "" if task.best is None else f"{task.best:.4f}"
            state = "finished" if task.state == "skipped" else task.state
            kept[task.folder.name] = f"{task.folder.name:<12}{state:<10}{best:<10}{task.job.label}"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        "\n".join([f"{'folder':<12}{'state':<10}{'best':<10}job", *kept.values()]) + "\n", encoding="utf-8"
    )
    temporary.replace(path)


def best_of(tasks: Sequence[Task]) -> Task | None:
    """Returns the job with the best objective so far."""
    return min(
        (t for t in tasks if t.best is not None and t.state != "same"), key=lambda t: t.best or 0.0, default=None
    )


@contextmanager
def live(tasks: Sequence[Task], folder: Path, total: int | None = None) -> Iterator[Callable[[Task], None]]:
    """Yields what to call when a job starts, was validated or ends.

    On a terminal the running jobs have a line each that is drawn again; elsewhere a line is printed at start and end.
    total: how many jobs there will be, None: those there are.
    """
    from rich.live import Live
    from rich.text import Text

    console = new_console()

    def count() -> int:
        return total or len(tasks)

    def running() -> Text:
        best = best_of(tasks)
        done = sum(task.state in ("finished", "skipped", "same", "pruned", "failed") for task in tasks)
        so_far = f"  best so far {best.best:.4f}: job {best.number}, {best.job.label}" if best else ""
        lines = [line(task, count()) for task in tasks if task.state == "running"]
        return Text("\n".join([*lines, f"{done}/{count()} done{so_far}"]), no_wrap=True, overflow="ellipsis")

    with (
        Live(get_renderable=running, console=console, refresh_per_second=2, transient=True)
        if console.is_terminal
        else _nothing() as screen
    ):

        def changed(task: Task) -> None:
            if task.state != "running" or not task.at:
                write_jobs(tasks, folder)
            if screen is not None:
                if task.state != "running":
                    style = STYLE.get(task.state, "")
                    console.print(Text(line(task, count()), style=style), no_wrap=True, overflow="ellipsis")
            elif task.state != "running" or not task.read:
                best = best_of(tasks)
                ended = best is not None and task.state != "running"
                so_far = f"  (best so far {best.best:.4f}: job {best.number})" if best and ended else ""
                say(line(task, count()) + so_far)

        yield changed


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def line(task: Task, total: int) -> str:
    """Returns a job's line: how far it is, its newest and best objective, what it is; what is long comes last."""
    width = len(str(total))
    if task.state == "running" and not task.total:
        steps = "starting"
    else:
        steps = f"step {task.step:>{len(str(task.total))}}/{task.total}" if task.total else ""
    if task.state == "running" and task.total:
        filled = BAR * task.step // task.total
        steps = f"{'━' * filled}{'╌' * (BAR - filled)} {steps}"
    elif task.state != "running":
        steps = f"{task.state:<8} {steps}"
    loss = "" if task.now is None else f"  valid {task.now:.4f}"
    if task.best is not None and task.best != task.now:
        loss += f" (best {task.best:.4f})"
    spent = time.time() - task.started if task.state == "running" else task.seconds
    why = task.error or task.pruned
    reason = f"  {why.splitlines()[0]}" if why else ""
    return f"job {task.number:>{width}}/{total}  {steps}{loss}  {spent:.0f} s  {task.job.label}{reason}"


def table(tasks: Sequence[Task], folder: Path) -> None:
    """Prints what became of every job, and of the failed ones why and where to read more."""
    from rich.table import Table
    from rich.text import Text

    write_jobs(tasks, folder)
    ended = Table(title=Text(f"Sweep {shown(folder)}", style="italic"), title_justify="left")
    for column, justify in (
        ("job", "left"),
        ("state", "left"),
        ("best", "right"),
        ("steps", "right"),
        ("folder", "left"),
    ):
        ended.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for task in tasks:
        best = "" if task.best is None else f"{task.best:.4f}"
        state = Text(SAID.get(task.state, task.state), style=STYLE.get(task.state, ""))
        ended.add_row(Text(task.job.label), state, best, str(task.step or ""), task.folder.name)
    new_console(width=None if sys.stdout.isatty() else 140).print(ended)
    for task in tasks:
        if task.state == "failed":
            where = shown(task.folder / "log" / "traceback.txt")
            say(f"job {task.number} failed: {task.error.splitlines()[0] if task.error else ''}\n    {where}")
        if task.state == "pruned" and task.pruned:
            say(f"job {task.number} was ended early: {task.pruned}")
