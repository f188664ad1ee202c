"""Jobs side by side: each under a supervisor process of its own, with its share of the cores and GPUs.

A supervisor is forked from the fork server, writes the output of its job to `log/output.txt` in the run folder, and
ends with this process: kill -9 of the sweep leaves nothing running.
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
from mft.launch import job
from mft.launch.launch import Stopped, warm
from mft.launch.spawn import handlers, variables
from mft.launch.worker import INTERRUPTED, SAVED, UNSAVED

LOOK_SECONDS = 0.5
"""How often the running jobs' metrics are read."""


@dataclass
class Task:
    """One job in a pool: what it is, where it runs, and how far it has come."""

    number: int
    job: job.Job
    folder: Path
    state: str = "waiting"  # waiting, running, finished, skipped, failed, stopped, pruned
    error: str = ""
    step: int = 0
    total: int = 0
    now: float | None = None  # the objective at the newest validation
    best: float | None = None
    at: dict[int, float] = field(default_factory=dict)  # step -> objective
    started: float = 0.0
    seconds: float = 0.0
    read: int = 0  # bytes of metrics.jsonl that are known
    pruned: str = ""  # why it was asked to end early

    def look(self) -> bool:
        """Reads what the job has logged since the last look; returns whether a validation is among it."""
        news = False
        if not self.total:
            self.total = int(read_json(self.folder / "plan.json").number("total_steps") or 0)
        rows, self.read = run_folder.rows_from(self.folder / "metrics.jsonl", self.read)
        for row in rows:
            self.step = max(self.step, int(row["step"]))
            value = self.job.judged(row)
            if value is not None:
                self.now, news = value, True
                self.at[int(row["step"])] = value
                self.best = value if self.best is None else min(self.best, value)
        return news

    def best_until(self, step: int) -> float | None:
        """Returns the best objective at or before a step, None where the job was not validated by then."""
        return min((value for at, value in self.at.items() if at <= step), default=None)


def run(
    waiting: Iterator[Task],
    side_by_side: int,
    fail_fast: bool,
    changed: Callable[[Task], None],
    hopeless: Callable[[Task], str],
) -> int:
    """Runs the tasks that `waiting` yields, at most so many at a time; returns the signal that ended it, 0: none.

    The next task is asked for when a place is free, so that a search can learn from those that have ended.
    changed: told of every task that starts, was validated or ends; hopeless: says why a task is to end early, or "".
    """
    places = shares(side_by_side)
    running: dict[int, tuple[Any, Task]] = {}  # place -> supervisor, task
    over = False
    warm()
    with forwarded(running) as asked:
        while True:
            for place in (p for p in range(len(places)) if p not in running):
                over = over or bool(asked)
                task = None if over else next(waiting, None)
                if task is None:
                    over = True
                    break
                running[place] = (_start(task, *places[place]), task)
                changed(task)
            if not running:
                return asked[0] if asked else 0
            multiprocessing.connection.wait([process.sentinel for process, _ in running.values()], LOOK_SECONDS)
            for place, (process, task) in list(running.items()):
                if task.look():
                    changed(task)
                    if not task.pruned and task.step < task.total and (reason := hopeless(task)):
                        task.pruned = reason
                        os.kill(process.pid, signal.SIGTERM)
                if process.exitcode is not None:
                    del running[place]
                    _ended(task, process.exitcode)
                    over = over or (fail_fast and task.state == "failed")
                    changed(task)


def shares(jobs: int) -> list[tuple[list[int], list[str]]]:
    """Returns (cores, GPUs) of each of so many jobs side by side; one job gets everything, told as two empty lists."""
    if jobs == 1:
        return [([], [])]
    from mft.hardware import visible_gpus

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = named or [str(number) for number in range(visible_gpus())]
    if gpus and len(gpus) < jobs:
        raise UserError(f"launch.jobs={jobs}, but {len(gpus)} GPUs are visible; a job needs at least one of its own.")

    def part(things: list[Any], number: int) -> list[Any]:
        size = len(things) // jobs
        return things[number * size : (number + 1) * size] if size else things[number % len(things) :][:1]

    return [(part(cores, n) if cores else [], part(gpus, n) if gpus else []) for n in range(jobs)]


@contextmanager
def forwarded(running: dict[int, tuple[Any, Task]]) -> Iterator[list[int]]:
    """Hands signals on to the supervisors, which have their own sessions; a second signal ends everything at once."""
    asked: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        if asked:
            os._exit(128 + signum)  # the supervisors and their ranks see this process gone
        asked.append(signum)
        print("\nstopping: running jobs save a checkpoint first (once more: at once)", file=sys.stderr)
        for process, _ in list(running.values()):
            if process.exitcode is None:
                os.kill(process.pid, signum)

    with handlers(forward):
        yield asked


def _start(task: Task, cores: list[int], gpus: list[str]) -> Any:
    task.state, task.started, task.read, task.at, task.best = "running", time.time(), 0, {}, None
    task.look()
    task.folder.joinpath("log").mkdir(parents=True, exist_ok=True)
    task.folder.joinpath("log", "traceback.txt").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=supervise, args=(task.job, task.folder, cores, gpus, variables()))
    process.start()
    return process


def _ended(task: Task, code: int) -> None:
    task.seconds = time.time() - task.started
    summary = read_json(task.folder / "summary.json")
    if code == 0 and summary.get("status") == "finished":
        task.state, task.pruned = "finished", ""
    elif task.pruned and code in (SAVED, UNSAVED):
        task.state = "pruned"
        write_json(task.folder / "pruned.json", {"reason": task.pruned, "step": task.step})
    elif code in (SAVED, INTERRUPTED, UNSAVED, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        task.state = "stopped"
    else:
        task.state = "failed"
        told = read_json(task.folder / "log" / "failure.json").text("sentence")
        task.error = told or f"its process died ({code}) without a word; its output is in {task.folder}/log"


def supervise(current: job.Job, folder: Path, cores: list[int], gpus: list[str], environment: dict[str, str]) -> None:
    """Runs one job in ranks of this process; leaves with 0, 1 (failed: log/failure.json) or a worker's code."""
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
        job.run(current, folder)
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None
    except KeyboardInterrupt:  # before the ranks were up
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        leave_failure(folder, error)
        raise SystemExit(1) from None


def leave_failure(folder: Path, error: Exception) -> None:
    """Leaves what ended a job in its folder: log/failure.json (a sentence), log/traceback.txt, and status failed."""
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
        write_json(folder / "summary.json", summary | {"status": "failed", "error": sentence})
        (log / "traceback.txt").write_text(hidden(trace), encoding="utf-8")
    say(f"mft: this job failed: {error}", sys.stderr)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(UNSAVED)
