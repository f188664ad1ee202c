"""The jobs of a grid: checked before the first starts, run, and reported; a failure ends one job, not the
sweep."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from mft.config.build import component
from mft.config.schema import LaunchMode
from mft.console.screen import say
from mft.errors import UserError
from mft.files.json_file import read_json
from mft.launch import launch, placement, resume_choice, signals
from mft.launch.job import Job, objective
from mft.run_folder import RunStatus, state, status
from mft.sweep import display, pool, supervisor
from mft.sweep.composer import Composer, check_all
from mft.sweep.folder import DryRunDone, SweepContext, checking, job_folder, taken
from mft.sweep.names import named
from mft.sweep.pool import SweepJob

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

    from mft.tracking.base import Tracker


def run_grid(context: SweepContext, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    """Runs the jobs of a sweep and returns Hydra's JobReturn of each.

    Finished jobs are skipped and unfinished ones resumed. A failed job leaves its traceback in its folder and
    the others run; at the end a table shows how each ended. Raises UserError if any failed, Stopped after a
    signal.
    """
    from hydra.core.utils import JobReturn, JobStatus

    jobs = plan_jobs(context, job_overrides)
    carry_out(context, jobs, lambda waiting: _run_waiting(waiting, jobs, context.folder))
    results = []  # our own grid ignores them, sweepers of other packages learn from them
    for overrides, job in zip(job_overrides, jobs, strict=True):
        value = objective(read_json(job.folder / "summary.json"))
        done = JobReturn(overrides, job.checked.cfg, None, str(job.folder), "mft", JobStatus.COMPLETED, value)
        results.append(done)
    return results


def plan_jobs(
    context: SweepContext, job_overrides: Sequence[Sequence[str]], starts: bool = True
) -> list[SweepJob]:
    """Returns the checked jobs with their folders and states; a dry run prints them and raises DryRunDone.

    starts: whether this process is about to run them.
    """
    jobs: list[SweepJob] = []
    with checking(context.folder):
        composer = Composer(context, starts)
        checked = check_all(composer, job_overrides)
        checked = named(checked, [composer.swept(job) for job in checked], context.folder)
        for number, job in enumerate(checked, start=1):
            jobs.append(sweep_job(job, context.folder, number, jobs))
        for note in composer.notes or ():
            say(note)
        if context.dry_run:
            display.plan(jobs, context.folder)
            raise DryRunDone
    return jobs


def carry_out(
    context: SweepContext, jobs: Sequence[SweepJob], run: Callable[[Sequence[SweepJob]], int]
) -> None:
    """Runs the waiting jobs by `run`, which returns the signal that ended it, and reports; raises as
    `run_grid`."""
    waiting = [job for job in jobs if job.state == RunStatus.waiting]
    with taken(context.cfg, context.folder, {job.folder.name: job.checked.name for job in jobs}):
        display.start(jobs, context.folder)
        finish(jobs, context.folder, run(waiting) if waiting else 0)
    require_success(jobs)


def sweep_job(checked: Job, folder: Path, number: int, earlier: Sequence[SweepJob]) -> SweepJob:
    """Returns a job with its folder, its progress, and its state: waiting, skipped, pruned, or same (as an
    earlier one)."""
    job = SweepJob(number, checked, job_folder(checked, folder))
    if any(other.folder == job.folder for other in earlier):
        job.state = RunStatus.same
    elif resume_choice.is_finished(job.folder, checked.identity):
        job.state = RunStatus.skipped
    elif checked.cfg.launch.prune and state(job.folder) is RunStatus.pruned:
        job.state = RunStatus.pruned
    job.update()
    return job


def finish(jobs: Sequence[SweepJob], folder: Path, signum: int) -> None:
    """Prints how every job ended and writes the report; raises Stopped if a signal ended the sweep."""
    display.table(jobs, folder)
    if signum:
        say(f"stopped; resume with: mft sweep resume {os.path.relpath(folder)}")
        raise signals.Stopped(signum, signals.INTERRUPTED if signum == signal.SIGINT else signals.SAVED)
    try:
        from mft.comparison.report import leave_report

        if report := leave_report(folder):
            say(f"report: {os.path.relpath(report)}")
            cfg = jobs[0].checked.cfg
            for tracker in _trackers(cfg):
                tracker.report(folder, report, {"sweep": str(cfg.sweep or folder.name), "name": cfg.name})
    except Exception as error:  # the results exist; a missing picture must not look like a failed sweep
        say(f"the report could not be written: {type(error).__name__}: {error}")


def require_success(jobs: Sequence[SweepJob]) -> None:
    """Raises UserError unless all jobs are done."""
    words = {RunStatus.failed: "failed", RunStatus.stopped: "stopped", RunStatus.waiting: "not started"}
    counts = {word: sum(job.state == state for job in jobs) for state, word in words.items()}
    missing = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    if missing:
        sentence = f"of {len(jobs)} jobs {missing}; the same command again runs them and skips the others."
        error = UserError(sentence)
        error.exit_code = 1
        raise error


def _run_waiting(waiting: Sequence[SweepJob], jobs: Sequence[SweepJob], folder: Path) -> int:
    """Runs jobs in separate processes, or here; returns the signal that ended it, 0: none."""
    cfg = waiting[0].checked.cfg
    if cfg.launch.mode is LaunchMode.inline or placement.detect_rank() is not None:
        _run_here(waiting, len(jobs), cfg.launch.fail_fast)
        return 0
    return run_side_by_side(iter(waiting), jobs, folder, cfg, min(cfg.launch.jobs, len(waiting)), len(jobs))


def run_side_by_side(
    waiting: Iterator[SweepJob],
    jobs: Sequence[SweepJob],
    folder: Path,
    cfg: DictConfig,
    at_once: int,
    total: int,
    on_end: Callable[[SweepJob], None] = lambda job: None,
) -> int:
    """Runs what an iterator yields, so many jobs at once; returns the signal that ended it, 0: none.

    jobs: all of the sweep, for the median rule and the display, may grow; cfg: of one job; total: how many
    jobs there will be; on_end: called with every job that has ended.
    """
    if at_once > 1:  # a new database takes seconds to create, and the jobs would wait for the one that does
        for tracker in _trackers(cfg):
            tracker.prepare()
    with display.live(jobs, folder, total) as show:

        def on_change(job: SweepJob) -> None:
            if job.state != RunStatus.running:
                on_end(job)
            show(job)

        return pool.run(waiting, jobs, at_once, cfg.launch, on_change)


def _trackers(cfg: DictConfig) -> list[Tracker]:
    return [component(cfg, f"tracking.{name}") for name in cfg.tracking]


def _run_here(waiting: Sequence[SweepJob], total: int, fail_fast: bool) -> None:
    """Runs the jobs in this process, one after another, with their output on the terminal (inline, or placed
    ranks)."""
    for job in waiting:
        say(f"\njob {job.number}/{total}  {job.checked.label}")
        try:
            launch.launch(job.checked, job.folder)
            job.state = status(job.folder)
        except Exception as error:
            supervisor.leave_failure(job.folder, error)
            job.state, job.error = RunStatus.failed, str(error)
        job.update()
        if job.state == RunStatus.failed and fail_fast:
            break
