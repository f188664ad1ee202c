"""Jobs side by side: each under a supervisor process of its own, with its share of the cores and GPUs.

A supervisor is forked from the fork server, writes the output of its job to `log/output.txt` in the run
folder, and ends with this process: kill -9 of the sweep leaves nothing running.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mft import run_folder
from mft.console.credentials import hidden
from mft.console.screen import say
from mft.errors import UserError, full_disk
from mft.files.json_file import read_json, write_json
from mft.launch.job import Job
from mft.launch.launch import launch
from mft.launch.signals import INTERRUPTED, SAVED, UNSAVED, Stopped, handlers
from mft.launch.spawn import environment, start_fork_server
from mft.run_folder import RunStatus

LOOK_SECONDS = 0.5
"""How often the running jobs' metrics are read."""

Supervisor = Any
"""A process of multiprocessing's forkserver context."""


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
    value: float | None = None
    """The objective (train.best) at the newest validation."""
    best: float | None = None
    """The lowest objective so far."""
    values: dict[int, float] = field(default_factory=dict)
    """Step → objective, of every validation."""
    started: float = 0.0
    """Seconds since 1970."""
    seconds: float = 0.0
    """How long it took."""
    offset: int = 0
    """Bytes of metrics.jsonl that have been read."""
    prune_reason: str = ""
    """Why it was asked to end early, in a sentence."""

    def update(self) -> bool:
        """Reads what the job has logged since the last time; returns whether a validation is among it."""
        validated = False
        if not self.total_steps:
            plan = read_json(self.folder / "plan.json")
            self.total_steps = int(plan.number("total_steps") or 0)
        rows, self.offset = run_folder.metric_rows(self.folder / "metrics.jsonl", self.offset)
        for row in rows:
            self.step = max(self.step, int(row["step"]))
            value = self.checked.judged(row)
            if value is not None:
                self.value, validated = value, True
                self.values[int(row["step"])] = value
                self.best = value if self.best is None else min(self.best, value)
        return validated

    def best_until(self, step: int) -> float | None:
        """Returns the best objective at or before a step, None where the job was not validated by then."""
        return min((value for at, value in self.values.items() if at <= step), default=None)


def run(
    waiting: Iterator[SweepJob],
    side_by_side: int,
    fail_fast: bool,
    on_change: Callable[[SweepJob], None],
    should_prune: Callable[[SweepJob], str],
) -> int:
    """Runs the jobs that `waiting` yields, at most so many at a time; returns the signal that ended it, 0:
    none.

    The next job is asked for when a place is free, so that a search can learn from those that have ended.
    on_change: called with every job that starts, was validated or ends; should_prune: returns why a job is to
    end early, or "".
    """
    places = partition_devices(side_by_side)
    running: dict[int, tuple[Supervisor, SweepJob]] = {}  # by place
    over = False  # no further job is started
    start_fork_server()
    with forwarded(running) as signals:
        while True:
            for place in (p for p in range(len(places)) if p not in running):
                over = over or bool(signals)
                job = None if over else next(waiting, None)
                if job is None:
                    over = True
                    break
                running[place] = (_start(job, *places[place]), job)
                on_change(job)
            if not running:
                return signals[0] if signals else 0
            multiprocessing.connection.wait(
                [process.sentinel for process, _ in running.values()], LOOK_SECONDS
            )
            for place, (process, job) in list(running.items()):
                if job.update():
                    on_change(job)
                    if not job.prune_reason and job.step < job.total_steps and (reason := should_prune(job)):
                        job.prune_reason = reason
                        os.kill(process.pid, signal.SIGTERM)
                if process.exitcode is not None:
                    del running[place]
                    _ended(job, process.exitcode)
                    over = over or (fail_fast and job.state == RunStatus.failed)
                    on_change(job)


def partition_devices(jobs: int) -> list[tuple[list[int], list[str]]]:
    """Returns (cores, GPUs) of each of so many jobs side by side; two empty lists stand for all of them."""
    if jobs == 1:
        return [([], [])]
    from mft.hardware import visible_gpus

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = named or [str(number) for number in range(visible_gpus())]
    if gpus and len(gpus) < jobs:
        raise UserError(
            f"launch.jobs={jobs}, but {len(gpus)} GPUs are visible; a job needs at least one of its own."
        )

    def part(devices: list[Any], number: int) -> list[Any]:
        size = len(devices) // jobs
        return devices[number * size : (number + 1) * size] if size else devices[number % len(devices) :][:1]

    return [(part(cores, n) if cores else [], part(gpus, n) if gpus else []) for n in range(jobs)]


@contextmanager
def forwarded(running: dict[int, tuple[Supervisor, SweepJob]]) -> Iterator[list[int]]:
    """Forwards signals to the supervisors, which have their own sessions; a second signal ends everything at
    once."""
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + signum)  # the supervisors and their ranks see this process gone
        received.append(signum)
        print("\nStopping: saving checkpoints. Press Ctrl-C again to quit immediately.", file=sys.stderr)
        for process, _ in list(running.values()):
            if process.exitcode is None:
                os.kill(process.pid, signum)

    with handlers(forward):
        yield received


def _start(job: SweepJob, cores: list[int], gpus: list[str]) -> Supervisor:
    job.state, job.started, job.offset, job.values, job.best = RunStatus.running, time.time(), 0, {}, None
    job.update()
    job.folder.joinpath("log").mkdir(parents=True, exist_ok=True)
    job.folder.joinpath("log", "traceback.txt").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=supervise, args=(job.checked, job.folder, cores, gpus, environment()))
    process.start()
    return process


def _ended(job: SweepJob, code: int) -> None:
    """Notes how a job ended. code: of its supervisor, negative for a signal."""
    job.seconds = time.time() - job.started
    summary = read_json(job.folder / "summary.json")
    if code == 0 and summary.get("status") == RunStatus.finished:
        job.state, job.prune_reason = RunStatus.finished, ""
    elif job.prune_reason and code in (SAVED, UNSAVED):
        job.state = RunStatus.pruned
        write_json(job.folder / "pruned.json", {"reason": job.prune_reason, "step": job.step})
    elif code in (SAVED, INTERRUPTED, UNSAVED, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        job.state = RunStatus.stopped
    else:
        job.state = RunStatus.failed
        sentence = read_json(job.folder / "log" / "failure.json").text("sentence")
        job.error = (
            sentence or f"the process exited unexpectedly (code {code}); its output is in {job.folder}/log"
        )


def supervise(job: Job, folder: Path, cores: list[int], gpus: list[str], environment: dict[str, str]) -> None:
    """Runs one job in ranks of this process; leaves with 0, 1 (failed: log/failure.json) or a worker's
    code."""
    os.setsid()  # a Ctrl-C of the terminal reaches the sweep alone, which hands it on once
    os.environ.update(environment)
    log = folder / "log"
    output = os.open(log / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if cores:
        os.sched_setaffinity(0, cores)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    threading.Thread(target=_end_with_parent, daemon=True, name="watchdog").start()
    try:
        launch(job, folder)
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None
    except KeyboardInterrupt:  # before the ranks were up
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        leave_failure(folder, error)
        raise SystemExit(1) from None


def leave_failure(folder: Path, error: Exception) -> None:
    """Leaves what ended a job in its folder: log/failure.json (a sentence), log/traceback.txt, and status
    failed."""
    trace = getattr(error, "traceback", "") or "".join(traceback.format_exception(error))
    sentence = getattr(error, "sentence", "") or (
        str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    )
    sentence = hidden(str(full_disk(error) or sentence))
    log = folder / "log"
    with suppress(OSError):  # the disk that ended the job may be full
        log.mkdir(parents=True, exist_ok=True)
        write_json(log / "failure.json", {"sentence": sentence, "time": time.time()})
        summary = read_json(folder / "summary.json")
        write_json(folder / "summary.json", summary | {"status": RunStatus.failed, "error": sentence})
        (log / "traceback.txt").write_text(hidden(trace), encoding="utf-8")
    say(f"mft: this job failed: {error}", sys.stderr)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(UNSAVED)
