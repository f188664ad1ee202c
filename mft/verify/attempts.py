"""Trains a cell twice, straight through and with a stop, and judges whether the two are the same run."""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mft.files.json_file import read_json
from mft.hardware import visible_gpus
from mft.launch.job import Job
from mft.launch.signals import INTERRUPTED, UNSAVED, Stopped
from mft.run_folder import MICRO_BATCH, RunStatus
from mft.sweep import pool
from mft.sweep.pool import SweepJob
from mft.training.trace import Trace, read
from mft.verify.cells import Cell
from mft.verify.difference import Difference, first_difference

GPU = "; on a GPU this may be kernels that add in another order every time, unless train.deterministic=true"
BEFORE_THE_STOP = "; this is before the stop, so the machine computes the same step in more than one way"


class Verdict(StrEnum):
    """What became of a cell."""

    passed = "passed"
    failed = "failed"
    refused = "refused"
    """The config cannot be run; nothing was compared."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on a cell."""

    cell: Cell
    verdict: Verdict
    reason: str = ""
    """The first difference, or why it was refused."""
    seconds: float = 0.0


def verify(cell: Cell, folder: Path, at: int, steps: int) -> Outcome:
    """Trains a cell in two run folders below `folder` and compares them.

    at: the step after which the second run stops; steps: the length of both. Raises Stopped after a signal.
    """
    began = time.monotonic()
    verdict, reason = judged(cell.job, folder, at, steps) if cell.job else (Verdict.refused, cell.refusal)
    return Outcome(cell, verdict, reason, time.monotonic() - began)


def judged(job: Job, folder: Path, at: int, steps: int) -> tuple[Verdict, str]:
    """Returns the verdict on a checked job, and its reason. The arguments are those of `verify`."""
    straight, interrupted = folder / "uninterrupted", folder / "resumed"
    ran = run(job, straight, Trace())
    trained = [step for step, _ in read(straight).get(0, [])]
    if ran.state is not RunStatus.finished:
        users = read_json(straight / "log" / "failure.json").get("user") is True
        return (Verdict.refused if users and not trained else Verdict.failed), ran.error or str(ran.state)
    if (last := max(trained, default=0)) <= at or ran.total_steps < steps:
        return Verdict.refused, too_short(last, ran.total_steps, at, steps)
    if (found := straight / MICRO_BATCH).exists():  # another moment's memory may ask for another size
        interrupted.mkdir(parents=True, exist_ok=True)
        shutil.copy(found, interrupted)
    stopped = run(job, interrupted, Trace(stop_at=at))
    if stopped.state is not RunStatus.stopped:
        return Verdict.failed, f"the run did not stop after step {at}: {stopped.error or stopped.state}"
    resumed = run(job, interrupted, Trace())
    if resumed.state is not RunStatus.finished:
        return Verdict.failed, f"the resumed run did not finish: {resumed.error or resumed.state}"
    if difference := first_difference(straight, interrupted):
        return Verdict.failed, explained(difference, at)
    return Verdict.passed, ""


def run(job: Job, folder: Path, trace: Trace) -> SweepJob:
    """Runs a job in `folder`, from its newest checkpoint if there is one, in processes of its own.

    Returns how it ended; what its ranks print is in log/output.txt.
    """
    attempt = SweepJob(1, job, folder, trace=trace)
    if signum := pool.run(iter([attempt]), [], 1, job.cfg.launch, lambda job: None):
        raise Stopped(signum, INTERRUPTED if signum == signal.SIGINT else UNSAVED)
    return attempt


def too_short(last: int, total: int, at: int, steps: int) -> str:
    """Returns why nothing can be proved on a run that ended after step `last`. total: its planned length."""
    if total < steps:
        return f"--steps {steps}: the run has only {total} steps; give fewer, or raise train.epochs."
    return f"--at {at}: early stopping ends the run after step {last}; stop it before that."


def explained(difference: Difference, at: int) -> str:
    """Returns a difference as a sentence, with what it may be due to besides the resume."""
    before = BEFORE_THE_STOP if difference.step is not None and difference.step <= at else ""
    return f"{difference}{before}{GPU if visible_gpus() else ''}"
