"""Kinds of faults: sweeps of two jobs side by side that are killed, stopped, damaged, or started twice."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import damages, moments
from benchmarks.faults.case import Case, Failure, Refusal
from benchmarks.faults.judge import differences
from benchmarks.faults.processes import Command, end_all, members
from benchmarks.faults.setups import COMMON, write_tasks
from mft import run_folder

SWEEP = (
    *COMMON,
    "loss=task_token_mean,coba",
    "launch.jobs=2",
    "launch.nproc=1",
    "peft=lora",
    "tracking=none",
)


class SweepCase(Case):
    """A case whose command is a sweep. Its commands are typed: jobs are forked from a server of their own."""

    def given(self) -> list[str]:
        """Returns the arguments of its command."""
        return ["train", "-m", *SWEEP, self.data()]

    @property
    def run(self) -> Path:
        """The first job's run folder: as the reference has it, but for the sweep's name, which the paths of its
        data decide."""
        reference = self.reference().relative_to(self.bench.root / "references" / "sweep")
        there = (folder for folder in (self.work / reference).parents[1].glob("*") if folder.is_dir())
        return next(there, self.work / reference.parent) / reference.name

    def reference(self) -> Path:
        """Returns the run folder of the first job of a sweep without a fault."""
        work = self.bench.root / "references" / "sweep"
        with self.bench.lock("sweep"):
            if not (work / "made").exists():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                command = self.bench.command(["train", "-m", *SWEEP, self.bench.data()], work, typed=True)
                if command.wait(300) != 0:
                    end_all(work)
                    raise SystemExit(f"a sweep cannot be run without a fault:\n{command.text()}")
                (work / "made").write_text(f"{command.seconds()}")
        return run_folder.runs_under(work / "multirun")[0]

    def seconds(self) -> float:
        """Returns how long the sweep takes without a fault."""
        self.reference()
        return float((self.bench.root / "references" / "sweep" / "made").read_text())

    def again(self) -> list[str]:
        """Returns the same command, or `mft sweep resume`, which is to do the same."""
        known = (self.run.parent / "sweep.json").exists()
        return ["sweep", "resume", "multirun/debug"] if known and self.draw.random() < 0.5 else self.given()

    def finished(self) -> bool:
        """Whether both jobs are."""
        return all(run_folder.status(job) == "finished" for job in self._jobs())

    def differences(self) -> list[str]:
        """Returns in what the jobs differ from those of the reference."""
        references = run_folder.runs_under(self.reference().parent)
        return [
            f"{reference.name}: {found}"
            for reference in references
            for found in differences(reference, self.run.parent / reference.name, self.losable)
        ]

    def _jobs(self) -> list[Path]:
        names = [run.name for run in run_folder.runs_under(self.reference().parent)]
        return [self.run.parent / name for name in names]


def killed(case: Case) -> None:
    """kill -9 of the sweep's process, of a job's supervisor or rank, or of all, at a random moment."""
    command, at = _at(case)
    whom = case.draw.choice(["the sweep", "a process of it", "all processes"])
    pids = [pid for pid in members(case.work) if pid != command.pid]
    if whom == "a process of it" and pids:
        command.send(signal.SIGKILL, case.draw.choice(pids))
    else:
        command.send(signal.SIGKILL, *({"the sweep": [command.pid]}.get(whom) or [command.pid, *pids]))
    case.strike(f"kill -9 of {whom} {at}")
    case.end(command, anything=True)


def stopped(case: Case) -> None:
    """SIGINT, SIGTERM or SIGHUP to the sweep, once or twice."""
    command, at = _at(case)
    signum = case.draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    command.send(signum)
    if case.draw.random() < 0.3:
        command.wait(case.draw.uniform(0, 0.5))
        command.send(signum)
    case.strike(f"{signum.name} {at}")
    case.end(command, anything=True)


def twice(case: Case) -> None:
    """The same sweep is started again while it runs: refused, and the first one goes on."""
    _second(case, lambda: (case.run.parent / "sweep.json").exists(), "already running")


def run_twice(case: Case) -> None:
    """The same run is started again while it runs: refused, and the first one goes on."""
    _second(case, (case.run / "identity.json").exists, "is being written by another process|already finished")


def damaged(case: Case) -> None:
    """A file of a sweep's folder or of a job in it, after the sweep was killed."""
    killed(case)
    case.end(case.start([*case.given(), "--dry-run"]))
    found = [path for path in damages.files(case.work / "multirun") if "log" not in path.parts]
    chosen = [path for path in found if path.parent == case.run.parent] if case.draw.random() < 0.5 else found
    if chosen:
        _damage(case, case.draw.choice(chosen))


def job_lost(case: Case) -> None:
    """The folder of a job is gone: it is run again."""
    killed(case)
    jobs = [job for job in case.run.parent.glob("*") if job.is_dir()]
    if jobs:
        job = case.draw.choice(sorted(jobs))
        shutil.rmtree(job)
        case.strike(f"{job.name}/ removed")


def data_changed(case: Case) -> None:
    """The data changed after a sweep was killed, and is as before in the end: its jobs are resumed."""
    case.tasks = case.work / "tasks"
    write_tasks(case.tasks)
    killed(case)
    shutil.rmtree(case.tasks)
    write_tasks(case.tasks, rows=59)
    case.strike("rows of the data changed for one command")
    case.end(case.start(case.given()))
    shutil.rmtree(case.tasks)
    write_tasks(case.tasks)
    case.codes.append(1)  # the original jobs are not finished by that


def _damage(case: Case, path: Path) -> None:
    if path.name == "identity.json":
        case.refusals.append(
            Refusal("identity.json is missing|holds a run|failed", lambda case: _remove(path))
        )
    if path.name == "metrics.jsonl":
        case.losable = True
    damages.damage(case, path)
    if "checkpoints" in path.parts:  # it may have been the only one of its job
        case.refusals.append(Refusal("of 2 jobs 1 failed", _remove_unsound_checkpoints))
    if path.name == "sweep.json":
        case.refusals.append(Refusal("run it by hand|is not a sweep", lambda case: None))


def _remove(identity: Path) -> None:
    shutil.rmtree(identity.parent, ignore_errors=True)


def _remove_unsound_checkpoints(case: Case) -> None:
    """Does what the job that failed advises; Failure where it failed for another reason."""
    found = re.search(r"No checkpoint in (\S+/checkpoints) is sound: .*after removing these", case.said[-1])
    if not found:
        raise Failure("LOST", case.said[-1][-1000:])
    shutil.rmtree(found[1])


def _at(case: Case) -> tuple[Command, str]:
    names = [name for name in moments.MOMENTS if name not in ("at start-up", "tokenising")]
    moment = case.draw.choice(names)
    command = case.start()
    return command, moments.reach(case, command, moment)


def _second(case: Case, begun: Callable[[], bool], refusal: str) -> None:
    first = case.start()
    if first.until(begun):
        first.wait(case.draw.uniform(0, 0.5))
        case.end_of_one(case.start())
        case.expects.append(refusal)
    case.strike("started a second time")
    if code := case.end(first):
        raise Failure("LOST", f"the first one ended with {code}: {case.sentence()}")
