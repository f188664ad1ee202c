"""What a user sees of a sweep: a line for each running job, a table at its end, and jobs.txt in its
folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import itemgetter
from pathlib import Path

from mft.console import screen, tables
from mft.console.screen import say
from mft.files.atomic import write_text
from mft.run_folder import RunStatus, state
from mft.sweep.pool import SweepJob

IN_WORDS = {
    RunStatus.finished: ("finished", "green"),
    RunStatus.skipped: ("finished before", "green"),
    RunStatus.failed: ("failed", "red"),
    RunStatus.stopped: ("stopped", "yellow"),
    RunStatus.pruned: ("pruned", "yellow"),
    RunStatus.same: ("same as an earlier job", ""),
    RunStatus.waiting: ("not started", ""),
}
"""State → its words, and their style."""

OPEN = (RunStatus.waiting, RunStatus.running, RunStatus.stopped)
"""States of jobs that still have something to do."""

BAR = 12
"""Characters of a running job's bar."""


def plan(jobs: Sequence[SweepJob], folder: Path) -> None:
    """Prints what a sweep would do."""
    from mft.training.checkpoint import newest

    say(f"sweep {os.path.relpath(folder)}: {len(jobs)} jobs")
    waiting = [job for job in jobs if job.state == RunStatus.waiting]
    for job in jobs:
        action = IN_WORDS[job.state][0]
        if job in waiting:
            checkpoint = newest(job.folder)
            before = state(job.folder) if job.folder.exists() else None
            action = "would run" if checkpoint is None else f"would resume from {checkpoint.name}"
            action = "is running in another process" if before is RunStatus.running else action
            action += " (failed before)" if before is RunStatus.failed else ""
        say(f"{job.number:>4}  {job.folder.name}  {action:<32}  {job.checked.label}")
    say(f"{len(waiting)} of {len(jobs)} jobs would run; nothing was started")


def start(jobs: Sequence[SweepJob], folder: Path) -> None:
    """Prints the sweep's folder and how much is left, and writes jobs.txt."""
    done = sum(job.state != RunStatus.waiting for job in jobs)
    say(f"sweep {os.path.relpath(folder)}: {len(jobs)} jobs" + (f", {done} of them done" if done else ""))
    write_jobs(jobs, folder)


def write_jobs(jobs: Sequence[SweepJob], folder: Path) -> None:
    """Writes jobs.txt: folder, state, best objective and overrides of every job, those of earlier commands as
    well."""
    path = folder / "jobs.txt"
    written = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    lines = {text.split()[0]: text for text in written}
    for job in jobs:
        if job.state != RunStatus.same:
            ended = RunStatus.finished if job.state == RunStatus.skipped else job.state
            cells = f"{job.folder.name:<12}{ended:<10}{_number(job.best):<10}{job.checked.label}"
            lines[job.folder.name] = cells
    write_text(path, "\n".join([f"{'folder':<12}{'state':<10}{'best':<10}job", *lines.values()]) + "\n")


def best_of(jobs: Sequence[SweepJob]) -> SweepJob | None:
    """Returns the job with the best objective so far."""
    bests = [(job.best, job) for job in jobs if job.state != RunStatus.same]
    # compared as read: in another thread the values of a job that is resumed are emptied
    validated = [(best, job) for best, job in bests if best is not None]
    return min(validated, key=itemgetter(0), default=(None, None))[1]


@contextmanager
def live(jobs: Sequence[SweepJob], folder: Path, total: int) -> Iterator[Callable[[SweepJob], None]]:
    """Yields a function to call with every job that starts, was validated or ends.

    On a terminal each running job has a line that is redrawn; elsewhere a line is printed at its start and
    end. total: how many jobs there will be.
    """
    from rich.live import Live
    from rich.text import Text

    console = screen.console()

    def best_so_far(short: bool = False) -> str:
        if (best := best_of(jobs)) is None:
            return ""
        text = f"best so far {_number(best.best)}: job {best.number}"
        return f"  ({text})" if short else f"  {text}, {best.checked.label}"

    def running() -> Text:
        lines = [line(job, total) for job in jobs if job.state == RunStatus.running]
        done = sum(job.state not in OPEN for job in jobs)
        text = "\n".join([*lines, f"{done}/{total} done{best_so_far()}"])
        return Text(text, no_wrap=True, overflow="ellipsis")

    def changed(job: SweepJob) -> None:
        ended = job.state != RunStatus.running
        if ended or not job.values:
            write_jobs(jobs, folder)
        if console.is_terminal and ended:
            text = Text(line(job, total), style=IN_WORDS[job.state][1])
            console.print(text, no_wrap=True, overflow="ellipsis")
        elif not console.is_terminal and (ended or not job.offset):  # the validations in between are many
            say(line(job, total) + (best_so_far(short=True) if ended else ""))

    redrawn = Live(get_renderable=running, console=console, refresh_per_second=2, transient=True)
    with redrawn if console.is_terminal else nullcontext():
        yield changed


def line(job: SweepJob, total: int) -> str:
    """Returns a job's line: progress, newest and best objective, time, and at the end the long parts: its
    overrides, and why it ended."""
    steps = f"step {job.step:>{len(str(job.total_steps))}}/{job.total_steps}" if job.total_steps else ""
    spent = job.seconds
    if job.state == RunStatus.running:
        filled = BAR * job.step // job.total_steps if job.total_steps else 0
        steps = f"{'━' * filled}{'╌' * (BAR - filled)} {steps}" if steps else "starting"
        spent = time.time() - job.started
    else:
        steps = f"{job.state:<8} {steps}"
    values = job.values  # replaced, in another thread, when the job is resumed
    newest = values[max(values)] if values else None
    loss = f"  valid {_number(newest)}" if values else ""
    loss += f" (best {_number(job.best)})" if job.best != newest else ""
    why = job.error or job.prune_reason
    reason = f"  {why.splitlines()[0]}" if why else ""
    number = f"{job.number:>{len(str(total))}}/{total}"
    return f"job {number}  {steps}{loss}  {spent:.0f} s  {job.checked.label}{reason}"


def table(jobs: Sequence[SweepJob], folder: Path) -> None:
    """Prints how every job ended, and for the failed ones why and where to read more."""
    from rich.text import Text

    write_jobs(jobs, folder)
    rows = []
    for job in jobs:
        words = Text(*IN_WORDS.get(job.state, (job.state, "")))
        rows.append([job.checked.label, words, _number(job.best), job.step or "", job.folder.name])
    columns, numbers = ["job", "state", "best", "steps", "folder"], ["best", "steps"]
    screen.console().print(tables.table(f"Sweep {os.path.relpath(folder)}", columns, rows, numbers))
    for job in jobs:
        if job.state == RunStatus.failed:
            traceback = os.path.relpath(job.folder / "log" / "traceback.txt")
            say(f"job {job.number} failed: {job.error.splitlines()[0] if job.error else ''}\n    {traceback}")
        if job.state == RunStatus.pruned and job.prune_reason:
            say(f"job {job.number} was pruned: {job.prune_reason}")


def _number(objective: float | None) -> str:
    return "" if objective is None else f"{objective:.4f}"
