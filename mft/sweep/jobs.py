"""The jobs of a sweep: composed and checked before the first starts, run, judged; a failure ends one job."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mft import run_folder
from mft.config.build import component
from mft.config.compose import absolute_paths
from mft.config.hydra_compose import without_hydra
from mft.config.identity import VERSION, identity_of
from mft.config.inert import given_keys, without_effect
from mft.config.interpolations import replaced
from mft.config.messages import explain, refusals
from mft.config.overrides import check_overrides, key_of
from mft.config.schema import LaunchMode, typed
from mft.config.yaml_file import circle
from mft.errors import UserError
from mft.files.json_file import read_json
from mft.launch import job, resume_choice
from mft.launch.launch import Stopped, place
from mft.launch.worker import SAVED
from mft.sweep import display, pool
from mft.sweep.command import IDENTITY_DIGITS, Shown, is_sweep, remove_if_unused, taken
from mft.sweep.pool import Task

OTHERS_FOR_THE_MEDIAN = 3
"""Jobs that must have come as far as one that is to be ended early."""

VALUE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)+=")
"""An override of a value, not of a group: `optimizer.lr=…`."""


class Composer:
    """Composes and checks the jobs of one sweep. Hydra composes once what differs by plain values alone."""

    def __init__(self, cfg: DictConfig, loader: Any, starts: bool = True):
        """cfg: the sweep's own config with its hydra node; loader: Hydra's config loader; starts: see `job.checked`."""
        self.cfg, self.loader, self.starts = cfg, loader, starts
        self.fixed = {key_of(o) for o in cfg.hydra.overrides.task if not is_sweep(o)}  # keys: Hydra writes true as True
        self.bases: dict[tuple[str, ...], DictConfig] = {}
        folders = [Path(str(folder).removeprefix("file://")) for folder in cfg.hydra.searchpath]
        self.given = given_keys(cfg.hydra.overrides.task, folders)
        self.notes: list[str] | None = None  # settings without effect in every job so far

    def label(self, overrides: Sequence[str]) -> str:
        """Returns what tells a job from the others of its sweep."""
        return " ".join(o for o in overrides if key_of(o) not in self.fixed) or "(all as given)"

    def job(self, overrides: Sequence[str]) -> job.Job:
        """Returns the checked job of these overrides; UserError that names it if it cannot run."""
        label = self.label(overrides)
        try:
            check_overrides(overrides)
            composed = self.composed(overrides)
            if composed.launch.get("nnodes", 1) > 1:
                raise UserError("a sweep runs on one machine; launch.nnodes is for one run on several.")
            ours = [o for o in overrides if key_of(o) != "sweep"]
            current = job.checked(absolute_paths(typed(replaced(composed))), ours, label, self.starts)
            notes = without_effect(current.cfg, current.world, self.given, sweep=True)
            self.notes = notes if self.notes is None else [note for note in self.notes if note in notes]
            return current
        except RecursionError:
            raise UserError(f"job {label}: {circle()}") from None
        except refusals() as error:
            search = [o for o in self.cfg.hydra.overrides.hydra if key_of(o) == "hydra.searchpath"]
            raise UserError(f"job {label}: {explain(error, search, overrides)}") from error
        except UserError as error:
            raise UserError(f"job {label}: {error}") from error

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """Returns what Hydra composes of these overrides (150 ms), or sets swept values in a copy of that."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        swept = [o for o in overrides if VALUE.match(o) and key_of(o) not in self.fixed]
        rest = tuple(o for o in overrides if o not in swept)
        if rest in self.bases:
            cfg = copy.deepcopy(self.bases[rest])
            try:
                for override in OverridesParser.create().parse_overrides(swept):
                    OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
                return cfg
            except OmegaConfBaseException:
                pass  # Hydra says it with the names that `explain` looks for
        cfg = without_hydra(self.loader.load_sweep_config(self.cfg, list(overrides)))
        self.bases.setdefault(rest, copy.deepcopy(cfg))
        return cfg


def checked(
    composer: Composer, job_overrides: Sequence[Sequence[str]], say: Callable[[str], None] = display.say
) -> list[job.Job]:
    """Composes and checks every job; UserError names the first one that cannot run, before any starts."""
    jobs, told = [], time.monotonic()
    for number, overrides in enumerate(job_overrides, start=1):
        jobs.append(composer.job(overrides))
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"checking jobs: {number} of {len(job_overrides)}")
    return jobs


def planned(
    cfg: DictConfig, loader: Any, job_overrides: Sequence[Sequence[str]], dry_run: bool, starts: bool = True
) -> list[Task]:
    """Returns the checked jobs with their folders and what is to be done with each; a dry run ends here, with Shown."""
    folder = folder_of(cfg)
    refuse_another_version(folder)
    try:
        composer = Composer(cfg, loader, starts and not dry_run)
        jobs = checked(composer, job_overrides)
    except UserError:
        remove_if_unused(folder)
        raise
    for note in composer.notes or ():
        display.say(note)
    tasks: list[Task] = []
    for number, current in enumerate(jobs, start=1):
        tasks.append(task_of(current, folder, number, tasks))
    if dry_run:
        display.plan(tasks, folder)
        remove_if_unused(folder)
        raise Shown
    return tasks


def folder_of(cfg: DictConfig) -> Path:
    """Returns the folder of a sweep."""
    return Path(cfg.hydra.sweep.dir).absolute()


def refuse_another_version(folder: Path) -> None:
    """Raises UserError for a sweep whose jobs another version of mft wrote: their folders are named otherwise, so that
    finished ones would run again beside them."""
    for run in run_folder.runs_under(folder) if folder.is_dir() else ():
        found = identity_of(run)
        if found is not None and found.version != VERSION:
            raise UserError(
                f"{display.shown(folder)} holds jobs that another version of mft wrote {found.numbers()}, so this "
                "sweep cannot be resumed; mft runs, show, compare, merge and generate still read them. Add sweep=NAME "
                "to its command to run it anew beside them."
            )


def task_of(current: job.Job, folder: Path, number: int, earlier: Sequence[Task]) -> Task:
    """Returns a job with its folder, how far it is, and its state: waiting, skipped, pruned, same (as an earlier)."""
    task = Task(number, current, folder / current.identity.extended[:IDENTITY_DIGITS])
    if any(other.folder == task.folder for other in earlier):
        task.state = "same"
    elif resume_choice.is_finished(task.folder, current.identity):
        task.state = "skipped"
    elif run_folder.state(task.folder) == "pruned" and current.cfg.train.prune:
        task.state = "pruned"
    task.look()
    return task


def run_grid(cfg: DictConfig, loader: Any, job_overrides: Sequence[Sequence[str]], dry_run: bool = False) -> list[Any]:
    """Runs the jobs of a sweep and returns Hydra's JobReturn of each.

    Finished jobs are skipped and unfinished ones resumed. A failed job leaves its traceback in its folder and the
    others run; at the end a table says what became of each. Raises UserError if any failed, Stopped
    after a signal.
    """
    tasks = planned(cfg, loader, job_overrides, dry_run)
    folder = folder_of(cfg)
    with taken(cfg, folder):
        display.start(tasks, folder)
        signum = _work(tasks, folder)
        finish(tasks, folder, signum)
    judge(tasks)
    return [_job_return(overrides, task) for overrides, task in zip(job_overrides, tasks, strict=True)]


def finish(tasks: Sequence[Task], folder: Path, signum: int) -> None:
    """Prints what became of every job and leaves the report; raises Stopped if a signal ended the sweep."""
    display.table(tasks, folder)
    if signum:
        display.say(f"stopped; `mft sweep resume {display.shown(folder)}` goes on")
        raise Stopped(signum, 130 if signum == 2 else SAVED)
    leave_report(tasks, folder)


def judge(tasks: Sequence[Task]) -> None:
    """Raises UserError unless all jobs are done."""
    counts = {state: sum(task.state == state for task in tasks) for state in ("failed", "stopped", "waiting")}
    said = [f"{n} {word}" for n, word in zip(counts.values(), ("failed", "stopped", "not started"), strict=True) if n]
    if said:
        again = "the same command again runs them and skips the others"
        error = UserError(f"of {len(tasks)} jobs {', '.join(said)}; {again}.")
        error.exit_code = 1
        raise error


def _work(tasks: list[Task], folder: Path) -> int:
    """Runs what waits; returns the signal that ended it, 0: none."""
    todo = [task for task in tasks if task.state == "waiting"]
    if not todo:
        return 0
    cfg = todo[0].job.cfg
    if cfg.launch.mode is LaunchMode.inline or place() is not None:
        return _here(tasks, cfg.train.fail_fast)
    return side_by_side(iter(todo), tasks, folder, cfg, min(cfg.launch.jobs, len(todo)))


def side_by_side(
    waiting: Any,
    tasks: Sequence[Task],
    folder: Path,
    cfg: DictConfig,
    jobs: int,
    total: int | None = None,
    ended: Callable[[Task], None] = lambda task: None,
) -> int:
    """Runs what an iterator yields, so many jobs at a time; returns the signal that ended it, 0: none.

    tasks: all of the sweep, for the median and the board, may grow; total: how many there will be; ended: told of every
    task that has ended.
    """
    if jobs > 1:  # a new database takes seconds, and jobs would wait for the one that makes it
        for tracker in trackers(cfg):
            tracker.prepare()

    def hopeless(task: Task) -> str:
        return behind(task, tasks, cfg.train.prune_after) if cfg.train.prune else ""

    with display.live(tasks, folder, total) as show:

        def changed(task: Task) -> None:
            if task.state != "running":
                ended(task)
            show(task)

        return pool.run(waiting, jobs, cfg.train.fail_fast, changed, hopeless)


def trackers(cfg: DictConfig) -> list[Any]:
    """Returns the trackers of a job."""
    return [component(cfg, f"tracking.{name}") for name in cfg.tracking]


def _here(tasks: Sequence[Task], fail_fast: bool) -> int:
    """Runs the jobs in this process, one after another, their output on the terminal (inline, or placed ranks)."""
    for task in (task for task in tasks if task.state == "waiting"):
        display.say(f"\njob {task.number}/{len(tasks)}  {task.job.label}")
        try:
            job.run(task.job, task.folder)
            task.state = run_folder.status(task.folder)
        except Exception as error:
            pool.leave_failure(task.folder, error)
            task.state, task.error = "failed", str(error)
        task.look()
        if task.state == "failed" and fail_fast:
            break
    return 0


def behind(task: Task, tasks: Sequence[Task], validations: int) -> str:
    """The median rule: says why a job is hopeless, "" while it is not.

    Its best objective so far is compared with the best that others had at the same step; those are the jobs that have
    come as far, at least OTHERS_FOR_THE_MEDIAN of them.
    """
    steps = [step for step in task.at if step > 0]
    if len(steps) < validations:
        return ""
    step = max(steps)
    values = [o.best_until(step) for o in tasks if o is not task and o.state != "same" and max(o.at, default=0) >= step]
    others = sorted(value for value in values if value is not None)
    if len(others) < OTHERS_FOR_THE_MEDIAN:
        return ""
    middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
    best = task.best_until(step)
    if best is None or best <= middle:
        return ""
    return f"at step {step} its best is {best:.4f}, the median of {len(others)} others {middle:.4f}"


def leave_report(tasks: Sequence[Task], folder: Path) -> None:
    """Leaves the comparison of what is finished in the sweep's folder, and with every tracker that keeps such files."""
    from mft.runs.report import leave_report

    try:
        report = leave_report(folder)
        if report is None:
            return
        display.say(f"report: {display.shown(report)}")
        cfg = tasks[0].job.cfg
        for tracker in trackers(cfg):
            tracker.report(folder, report, {"sweep": str(cfg.sweep or folder.name), "name": cfg.name})
    except Exception as error:  # the results are there; a picture less must not look like a failed sweep
        display.say(f"the report could not be written: {type(error).__name__}: {error}")


def _job_return(overrides: Sequence[str], task: Task) -> Any:
    from hydra.core.utils import JobReturn, JobStatus

    done = task.state in ("finished", "skipped", "pruned", "same")
    status = JobStatus.COMPLETED if done else JobStatus.FAILED
    returned = JobReturn(
        overrides=list(overrides), cfg=task.job.cfg, working_dir=str(task.folder), task_name="mft", status=status
    )
    summary = read_json(task.folder / "summary.json")
    returned.return_value = (
        job.objective(summary) if done else UserError(task.error or f"job {task.job.label}: {task.state}")
    )
    return returned
