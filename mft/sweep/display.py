"""What a person sees of a sweep: a line for each running job, a table at its end, and jobs.txt in its
folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from mft import run_folder
from mft.console.screen import console as new_console
from mft.console.screen import say
from mft.files.atomic import write_text
from mft.run_folder import RunStatus
from mft.sweep.pool import SweepJob

STYLE = {
    RunStatus.finished: "green",
    RunStatus.skipped: "green",
    RunStatus.failed: "red",
    RunStatus.stopped: "yellow",
    RunStatus.pruned: "yellow",
}
ENDED = (RunStatus.finished, RunStatus.skipped, RunStatus.same, RunStatus.pruned, RunStatus.failed)
"""States of jobs that have nothing left to do in this command."""

BAR = 12
"""Characters of a running job's bar."""

WORDS = {
    RunStatus.skipped: "finished before",
    RunStatus.same: "same as an earlier job",
    RunStatus.waiting: "not started",
}


def plan(jobs: Sequence[SweepJob], folder: Path) -> None:
    """Prints what a sweep would do."""
    from mft.training.checkpoint import newest

    say(f"sweep {os.path.relpath(folder)}: {len(jobs)} jobs")
    for job in jobs:
        action = WORDS.get(job.state, job.state)
        if job.state == RunStatus.waiting:
            checkpoint = newest(job.folder)
            before = run_folder.state(job.folder) if job.folder.exists() else None
            action = "would run" if checkpoint is None else f"would resume from {checkpoint.name}"
            action = "is running in another process" if before is RunStatus.running else action
            action += " (failed before)" if before is RunStatus.failed else ""
        say(f"{job.number:>4}  {job.folder.name}  {action:<32}  {job.checked.label}")
    waiting = sum(job.state == RunStatus.waiting for job in jobs)
    say(f"{waiting} of {len(jobs)} jobs would run; nothing was started")


def start(jobs: Sequence[SweepJob], folder: Path) -> None:
    """Prints the sweep's folder and how much is left, and writes jobs.txt."""
    waiting = sum(job.state == RunStatus.waiting for job in jobs)
    done = f", {len(jobs) - waiting} of them done" if waiting < len(jobs) else ""
    say(f"sweep {os.path.relpath(folder)}: {len(jobs)} jobs{done}")
    write_jobs(jobs, folder)


def write_jobs(jobs: Sequence[SweepJob], folder: Path) -> None:
    """Writes jobs.txt: folder, state, best objective and overrides of every job, those of earlier commands as
    well."""
    path = folder / "jobs.txt"
    kept = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else ():
        kept[line.split()[0]] = line
    for job in jobs:
        if job.state != RunStatus.same:
            best = "" if job.best is None else f"{job.best:.4f}"
            state = RunStatus.finished if job.state == RunStatus.skipped else job.state
            kept[job.folder.name] = f"{job.folder.name:<12}{state:<10}{best:<10}{job.checked.label}"
    write_text(path, "\n".join([f"{'folder':<12}{'state':<10}{'best':<10}job", *kept.values()]) + "\n")


def best_of(jobs: Sequence[SweepJob]) -> SweepJob | None:
    """Returns the job with the best objective so far."""
    return min(
        (t for t in jobs if t.best is not None and t.state != RunStatus.same),
        key=lambda t: t.best or 0.0,
        default=None,
    )


@contextmanager
def live(
    jobs: Sequence[SweepJob], folder: Path, total: int | None = None
) -> Iterator[Callable[[SweepJob], None]]:
    """Yields a function to call with every job that starts, was validated or ends.

    On a terminal each running job has a line that is redrawn; elsewhere a line is printed at its start and
    end. total: how many jobs there will be, None: as many as there are.
    """
    from rich.live import Live
    from rich.text import Text

    console = new_console()

    def count() -> int:
        return total or len(jobs)

    def running() -> Text:
        best = best_of(jobs)
        done = sum(job.state in ENDED for job in jobs)
        so_far = f"  best so far {best.best:.4f}: job {best.number}, {best.checked.label}" if best else ""
        lines = [line(job, count()) for job in jobs if job.state == RunStatus.running]
        return Text("\n".join([*lines, f"{done}/{count()} done{so_far}"]), no_wrap=True, overflow="ellipsis")

    with (
        Live(get_renderable=running, console=console, refresh_per_second=2, transient=True)
        if console.is_terminal
        else nullcontext() as screen
    ):

        def changed(job: SweepJob) -> None:
            if job.state != RunStatus.running or not job.values:
                write_jobs(jobs, folder)
            if screen is not None:
                if job.state != RunStatus.running:
                    style = STYLE.get(job.state, "")
                    console.print(Text(line(job, count()), style=style), no_wrap=True, overflow="ellipsis")
            elif job.state != RunStatus.running or not job.offset:
                best = best_of(jobs)
                ended = best is not None and job.state != RunStatus.running
                so_far = f"  (best so far {best.best:.4f}: job {best.number})" if best and ended else ""
                say(line(job, count()) + so_far)

        yield changed


def line(job: SweepJob, total: int) -> str:
    """Returns a job's line: progress, newest and best objective, time, and last what is long: what it is, and
    why."""
    width = len(str(total))
    if job.state == RunStatus.running and not job.total_steps:
        steps = "starting"
    else:
        steps = f"step {job.step:>{len(str(job.total_steps))}}/{job.total_steps}" if job.total_steps else ""
    if job.state == RunStatus.running and job.total_steps:
        filled = BAR * job.step // job.total_steps
        steps = f"{'━' * filled}{'╌' * (BAR - filled)} {steps}"
    elif job.state != RunStatus.running:
        steps = f"{job.state:<8} {steps}"
    loss = "" if job.value is None else f"  valid {job.value:.4f}"
    if job.best is not None and job.best != job.value:
        loss += f" (best {job.best:.4f})"
    spent = time.time() - job.started if job.state == RunStatus.running else job.seconds
    why = job.error or job.prune_reason
    reason = f"  {why.splitlines()[0]}" if why else ""
    return f"job {job.number:>{width}}/{total}  {steps}{loss}  {spent:.0f} s  {job.checked.label}{reason}"


def table(jobs: Sequence[SweepJob], folder: Path) -> None:
    """Prints how every job ended, and for the failed ones why and where to read more."""
    from rich.table import Table
    from rich.text import Text

    write_jobs(jobs, folder)
    ended = Table(title=Text(f"Sweep {os.path.relpath(folder)}", style="italic"), title_justify="left")
    for column, justify in (
        ("job", "left"),
        ("state", "left"),
        ("best", "right"),
        ("steps", "right"),
        ("folder", "left"),
    ):
        ended.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for job in jobs:
        best = "" if job.best is None else f"{job.best:.4f}"
        state = Text(WORDS.get(job.state, job.state), style=STYLE.get(job.state, ""))
        ended.add_row(Text(job.checked.label), state, best, str(job.step or ""), job.folder.name)
    new_console(width=None if sys.stdout.isatty() else 140).print(ended)
    for job in jobs:
        if job.state == RunStatus.failed:
            where = os.path.relpath(job.folder / "log" / "traceback.txt")
            say(f"job {job.number} failed: {job.error.splitlines()[0] if job.error else ''}\n    {where}")
        if job.state == RunStatus.pruned and job.prune_reason:
            say(f"job {job.number} was pruned: {job.prune_reason}")
