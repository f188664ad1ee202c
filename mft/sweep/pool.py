"""Jobs side by side: each under its own supervisor process, with its part of the cores and GPUs."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from omegaconf import DictConfig

from mft.errors import UserError
from mft.files.json_file import read_json, write_json
from mft.hardware import visible_gpus
from mft.launch import spawn
from mft.launch.job import Job
from mft.launch.signals import INTERRUPTED, SAVED, UNSAVED, first_signal
from mft.run_folder import RunStatus, metric_rows
from mft.sweep.supervisor import supervise

if TYPE_CHECKING:
    from mft.training.trace import Trace

LOOK_SECONDS = 0.5
"""How often the running jobs' metrics are read."""

OTHERS = 3
"""Jobs that must have come as far as one that is to be pruned by the median rule (launch.prune)."""

Device = TypeVar("Device", int, str)


@dataclass
class SweepJob:
    """One job of a sweep: what it is, where it runs, and how far it has come."""

    number: int
    """From 1, in the order of the sweep."""
    checked: Job
    """Its config and identity."""
    folder: Path
    """Its run folder."""
    state: RunStatus = RunStatus.waiting
    """How it stands in this command: waiting, running, or how it ended."""
    error: str = ""
    """Why it failed, in a sentence."""
    step: int = 0
    """The newest logged step."""
    total_steps: int = 0
    """Steps of the run, 0 while they are not known."""
    values: dict[int, float] = field(default_factory=dict)
    """Step → objective (train.best), of every validation, in the order of the steps."""
    started: float = 0.0
    """Seconds since 1970."""
    seconds: float = 0.0
    """How long it took."""
    offset: int = 0
    """Bytes of metrics.jsonl that have been read."""
    prune_reason: str = ""
    """Why it was asked to end early, in a sentence."""
    trace: Trace | None = None
    """What its ranks are to record, see `mft.run.run`."""

    @property
    def best(self) -> float | None:
        """The lowest objective so far, None before the first validation."""
        return min(self.values.values(), default=None)

    def update(self) -> bool:
        """Reads the rows logged since the last call; returns whether a validation is among them."""
        if not self.total_steps:
            self.total_steps = int(read_json(self.folder / "plan.json").number("total_steps") or 0)
        rows, self.offset = metric_rows(self.folder / "metrics.jsonl", self.offset)
        validated = False
        for row in rows:
            self.step = max(self.step, row["step"])
            if (value := self.checked.judged(row)) is not None:
                self.values[row["step"]] = value
                validated = True
        return validated


def run(
    waiting: Iterator[SweepJob],
    jobs: Sequence[SweepJob],
    side_by_side: int,
    settings: DictConfig,
    on_change: Callable[[SweepJob], None],
) -> int:
    """Runs the jobs that `waiting` yields, at most so many side by side; returns the signal that ended it, 0:
    none.

    The next job is requested when a part of the machine is free, so that a search can learn from those that
    have ended. jobs: all of the sweep, may grow; settings: `launch`; on_change: called with every job that
    starts, was validated or ends.
    """
    parts = partition_devices(side_by_side)
    running: dict[int, tuple[BaseProcess, SweepJob]] = {}  # by the number of its part of the machine
    closed = False  # no further job is started

    def forward(signum: int) -> None:  # supervisors have their own sessions, so no terminal reaches them
        print("\nStopping: saving checkpoints. Press Ctrl-C again to quit immediately.", file=sys.stderr)
        for process, _ in list(running.values()):
            _send(process, signum)

    spawn.start_fork_server()
    with first_signal(forward) as signals:
        while True:
            for part in (n for n in range(len(parts)) if n not in running):
                # between two jobs: a search takes long to propose one, and a signal may come meanwhile
                closed = closed or bool(signals)
                job = None if closed else next(waiting, None)
                if job is None:
                    closed = True
                    break
                running[part] = (_start(job, *parts[part]), job)
                on_change(job)
            if not running:
                return signals[0] if signals else 0
            sentinels = [process.sentinel for process, _ in running.values()]
            multiprocessing.connection.wait(sentinels, LOOK_SECONDS)
            for part, (process, job) in list(running.items()):
                if job.update():
                    on_change(job)
                    if settings.prune and not job.prune_reason and job.step < job.total_steps:
                        job.prune_reason = should_prune(job, jobs, settings.prune_after)
                        if job.prune_reason:
                            _send(process, signal.SIGTERM)
                if process.exitcode is not None:
                    del running[part]
                    _ended(job, process.exitcode)
                    closed = closed or (settings.fail_fast and job.state == RunStatus.failed)
                    on_change(job)


def should_prune(job: SweepJob, jobs: Sequence[SweepJob], validations: int) -> str:
    """Returns why a job is to be pruned, "" while it is not: its best objective is worse than the median.

    The median is of the best that the others had at the same step: those that have come as far, at least
    OTHERS of them. validations: how many the job gets before it may be pruned (launch.prune_after); the one
    before the first step does not count.
    """
    steps = [step for step in job.values if step > 0]
    if len(steps) < validations:
        return ""
    step, own = max(steps), min(job.values.values())
    bests = []
    for other in jobs:
        until = [value for at, value in other.values.items() if at <= step]
        if other is not job and other.state != RunStatus.same and until and max(other.values) >= step:
            bests.append(min(until))
    if len(bests) < OTHERS or own <= median(bests):
        return ""
    return f"at step {step} its best is {own:.4f}, the median of {len(bests)} others {median(bests):.4f}"


def partition_devices(jobs: int) -> list[tuple[list[int], list[str]]]:
    """Returns (cores, GPUs) of each of so many jobs side by side; two empty lists stand for all of them."""
    if jobs == 1:
        return [([], [])]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    # names as CUDA_VISIBLE_DEVICES has them (numbers or UUIDs): a job gets a part of that list
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = names or [str(number) for number in range(visible_gpus())]
    if gpus and len(gpus) < jobs:
        raise UserError(f"launch.jobs={jobs}, but {len(gpus)} GPUs are visible; each job needs its own.")

    def part(devices: list[Device], number: int) -> list[Device]:
        if size := len(devices) // jobs:
            return devices[number * size : (number + 1) * size]
        return [devices[number % len(devices)]] if devices else []  # more jobs than cores

    return [(part(cores, number), part(gpus, number)) for number in range(jobs)]


def _send(process: BaseProcess, signum: int) -> None:
    if process.exitcode is None and process.pid is not None:
        os.kill(process.pid, signum)


def _start(job: SweepJob, cores: list[int], gpus: list[str]) -> BaseProcess:
    # what an earlier attempt logged is read again: a resumed run cuts off the rows after its checkpoint
    job.state, job.started, job.offset, job.values = RunStatus.running, time.time(), 0, {}
    job.update()
    log = job.folder / "log"
    log.mkdir(parents=True, exist_ok=True)
    (log / "traceback.txt").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    arguments = (job.checked, job.folder, cores, gpus, spawn.environment(), job.trace)
    process = context.Process(target=supervise, args=arguments)
    process.start()
    return process


def _ended(job: SweepJob, code: int) -> None:
    """Notes how a job ended. code: exit code of its supervisor, negative for a signal."""
    job.seconds = time.time() - job.started
    summary = read_json(job.folder / "summary.json")
    # first: a job may finish in the moment it is to be pruned
    if code == 0 and summary.get("status") == RunStatus.finished:
        job.state, job.prune_reason = RunStatus.finished, ""
    elif job.prune_reason and code in (SAVED, UNSAVED):
        job.state = RunStatus.pruned
        write_json(job.folder / "pruned.json", {"reason": job.prune_reason, "step": job.step})
    # negative: the signal came before the supervisor had handlers
    elif code in (SAVED, INTERRUPTED, UNSAVED, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        job.state = RunStatus.stopped
    else:
        job.state = RunStatus.failed
        sentence = read_json(job.folder / "log" / "failure.json").text("sentence")
        job.error = sentence or f"the process exited unexpectedly (code {code}); see {job.folder}/log"
