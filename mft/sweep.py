"""Sweeps: all jobs are checked before the first starts, each has its identity's folder, a failure ends one job."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mft import board, job, pool, rundir
from mft.build import build, resolved
from mft.compose import absolute_paths, explain, search_path, without_hydra
from mft.config import CANNOT_CHANGE_THE_RESULT, LaunchMode, config_dir, register, typed
from mft.errors import UserError
from mft.launch import Stopped, place
from mft.pool import Task
from mft.worker import SAVED

IDENTITY_DIGITS = 10
"""Digits of a job's identity that name its folder: in a million jobs two collide with a probability below one half."""

RECORD = "sweep.json"
"""In the sweep's folder: the command that made it, so that it can be gone on with."""

IN_THE_ID = ("data.paths", "batch_size", "gradient_accumulation_steps")
"""Parts of keys that name a sweep though they are not, as such, part of a run's identity."""

OTHERS_FOR_THE_MEDIAN = 3
"""Jobs that must have come as far as one that is to be ended early."""


class Shown(Exception):
    """Raised by a dry run when everything is printed, through Hydra, to its caller."""


def through_hydra(
    overrides: Sequence[str], config_dirs: Sequence[Path], flags: Sequence[str], dry_run: bool = False
) -> None:
    """Serves what needs Hydra's own application: `-m` (calls `run_jobs`), `--cfg`, `--info`, `--hydra-help`."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    search = search_path(config_dirs)
    kept_argv, kept_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting, so that we can say it better
    try:
        ours = []
        if "-m" in flags or "--multirun" in flags:
            ours = [] if any(_key(o) == "sweep" for o in overrides) else [f"sweep={sweep_id(overrides)}"]
            ours += ["hydra.launcher.dry_run=true"] if dry_run else []
        sys.argv = ["mft train", *flags, *search, *overrides, *ours]
        hydra.main(version_base="1.3", config_path=str(config_dir().resolve()), config_name="config")(_other_launcher)()
    except Shown:
        pass
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, search, [o for o in overrides if not _is_sweep(o)])) from error
    finally:
        sys.argv = kept_argv
        if kept_full is None:
            del os.environ["HYDRA_FULL_ERROR"]


def resume(args: Sequence[str]) -> None:
    """mft sweep resume DIR: runs the command of a sweep's folder again, from the folder it was started in.

    Finished jobs are skipped, unfinished ones go on from their checkpoint, failed ones are tried again. Further
    overrides are added: mft sweep resume multirun/demo launch.jobs=2
    """
    if not args or "-h" in args or "--help" in args:
        print(resume.__doc__)
        return
    words = [arg for arg in args if arg != "--dry-run"]
    if words[0] == "resume":
        words = words[1:]
    elif not Path(words[0]).is_dir():
        raise UserError(f"mft sweep knows resume, not {words[0]!r}: mft sweep resume multirun/demo/…")
    if not words:
        raise UserError("mft sweep resume needs the folder of a sweep: mft sweep resume multirun/demo/…")
    folder = the_sweep(Path(words[0]))
    record = rundir.read_json(folder / RECORD)
    print(f"going on with: mft train -m {' '.join(record['overrides'])}")
    if not Path(record["folder"]).is_dir():
        raise UserError(f"{folder} was started in {record['folder']}, which is gone; run its command by hand.")
    os.chdir(record["folder"])
    here = [] if (Path(record["sweep_dir"])).resolve() == folder.resolve() else [f"hydra.sweep.dir={folder.resolve()}"]
    through_hydra([*record["overrides"], *words[1:], *here], [], ["-m"], dry_run="--dry-run" in args)


def the_sweep(folder: Path) -> Path:
    """Returns the sweep folder meant by `multirun/<name>/<id>` or, with one sweep in it, by `multirun/<name>`."""
    if (folder / RECORD).exists():
        return folder
    found = sorted(path.parent for path in folder.glob(f"*/{RECORD}"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{folder} is no sweep: there is no {RECORD} in it.")
    raise UserError(f"{folder} holds {len(found)} sweeps, name one of them: {', '.join(str(path) for path in found)}.")


def sweep_id(overrides: Sequence[str]) -> str:
    """Returns the hash of what is not swept, so that values can be added to an axis and all jobs keep their folders.

    What only says how jobs run (launch, tracking, logging) has no part in it.
    """
    kept = [o for o in overrides if not _says_how(_key(o))]
    fixed = sorted(o for o in kept if not _is_sweep(o))
    axes = sorted(_key(o) for o in kept if _is_sweep(o))
    return hashlib.sha1(repr((fixed, axes)).encode()).hexdigest()[:IDENTITY_DIGITS]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _says_how(key: str) -> bool:
    if any(part in key for part in IN_THE_ID):
        return False
    return key.startswith("hydra.") or any(key == p or key.startswith(f"{p}.") for p in CANNOT_CHANGE_THE_RESULT)


def _is_sweep(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


def _other_launcher(cfg: DictConfig) -> None:
    raise UserError("Jobs of a sweep run through hydra/launcher=mft (launch.jobs runs several side by side).")


def folder_name(current: job.Job) -> str:
    """Returns the name of a job's folder in its sweep."""
    return current.identity.extended[:IDENTITY_DIGITS]


def checked_jobs(
    cfg: DictConfig, loader: Any, job_overrides: Sequence[Sequence[str]], say: Callable[[str], None] = print
) -> list[job.Job]:
    """Composes and checks every job; UserError names the first one that cannot run, before any starts."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    OverridesParser.create()
    fixed = {_key(o) for o in cfg.hydra.overrides.task if not _is_sweep(o)}  # keys: Hydra writes true as True
    jobs, told = [], time.monotonic()
    for number, overrides in enumerate(job_overrides):
        label = " ".join(o for o in overrides if _key(o) not in fixed) or "(all as given)"
        try:
            composed = without_hydra(loader.load_sweep_config(cfg, list(overrides)))
            ours = [o for o in overrides if _key(o) != "sweep"]
            jobs.append(job.checked(absolute_paths(typed(resolved(composed))), ours, label))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"job {label}: {explain(error, [], overrides)}") from error
        except UserError as error:
            raise UserError(f"job {label}: {error}") from error
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"checking jobs: {number + 1} of {len(job_overrides)}")
    return jobs


def run_jobs(cfg: DictConfig, loader: Any, job_overrides: Sequence[Sequence[str]], dry_run: bool = False) -> list[Any]:
    """Runs the jobs of a sweep and returns Hydra's JobReturn of each.

    Finished jobs are skipped and unfinished ones resumed. A failed job leaves its traceback in its folder and the
    others run; at the end a table says what became of each. Raises UserError if any failed, Stopped
    after a signal.
    """
    folder = Path(cfg.hydra.sweep.dir).absolute()
    try:
        jobs = checked_jobs(cfg, loader, job_overrides)
    except UserError:
        _remove_if_unused(folder)
        raise
    tasks = [Task(n, current, folder / folder_name(current)) for n, current in enumerate(jobs, start=1)]
    for task in tasks:
        task.state = before(task, tasks[: task.number - 1])
        task.look()
    if dry_run:
        board.plan(tasks, folder)
        _remove_if_unused(folder)
        raise Shown
    try:
        held = rundir.lock(folder)
    except UserError:
        raise UserError(f"{folder}: this sweep is running already, in another process.") from None
    try:
        _record(cfg, folder)
        signum = _work(tasks, folder, jobs[0].cfg)
    finally:
        held.release()
    board.table(tasks, folder)
    if signum:
        board.say(f"stopped; `mft sweep resume {os.path.relpath(folder)}` goes on")
        raise Stopped(signum, 130 if signum == 2 else SAVED)
    leave_report(folder)
    judge(tasks)
    return [_job_return(overrides, task) for overrides, task in zip(job_overrides, tasks, strict=True)]


def judge(tasks: Sequence[Task]) -> None:
    """Raises UserError unless all jobs are done."""
    counts = {state: sum(task.state == state for task in tasks) for state in ("failed", "stopped", "waiting")}
    said = [f"{n} {word}" for n, word in zip(counts.values(), ("failed", "stopped", "not started"), strict=True) if n]
    if said:
        raise UserError(
            f"of {len(tasks)} jobs {', '.join(said)}; the same command again runs them and skips the others."
        )


def before(task: Task, earlier: Sequence[Task]) -> str:
    """Returns a job's state before the sweep: waiting if it is to run, skipped, pruned, or same (as an earlier one)."""
    if any(other.folder == task.folder for other in earlier):
        return "same"
    if rundir.is_finished(task.folder, task.job.identity):
        return "skipped"
    if rundir.state(task.folder) == "pruned" and task.job.cfg.train.prune:
        return "pruned"
    return "waiting"


def _work(tasks: list[Task], folder: Path, cfg: DictConfig) -> int:
    """Runs what waits; returns the signal that ended it, 0: none."""
    todo = [task for task in tasks if task.state == "waiting"]
    board.start(tasks, folder)
    if not todo:
        return 0
    if cfg.launch.mode is LaunchMode.inline or place() is not None:
        return _here(tasks, cfg.train.fail_fast)
    if cfg.launch.jobs > 1:  # a new database takes seconds, and jobs would wait for the one that makes it
        for name in cfg.tracking:
            build(cfg.tracking[name], f"tracking.{name}", (*job.ALLOWED_TARGETS, *cfg.train.allow_targets)).prepare()

    def hopeless(task: Task) -> str:
        return behind(task, tasks, cfg.train.prune_after) if cfg.train.prune else ""

    with board.live(tasks, folder) as changed:
        return pool.run(tasks, cfg.launch.jobs, cfg.train.fail_fast, changed, hopeless)


def _here(tasks: Sequence[Task], fail_fast: bool) -> int:
    """Runs the jobs in this process, one after another, their output on the terminal (inline, or placed ranks)."""
    for task in (task for task in tasks if task.state == "waiting"):
        board.say(f"\njob {task.number}/{len(tasks)}  {task.job.label}")
        try:
            job.run(task.job, task.folder)
            task.state = rundir.status(task.folder)
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


def _record(cfg: DictConfig, folder: Path) -> None:
    """Keeps the command, so that `mft sweep resume` can repeat it; the newest one, after values were added."""
    hydra = [o for o in cfg.hydra.overrides.hydra if _key(o) not in ("hydra.mode", "hydra.launcher.dry_run")]
    given = list(cfg.hydra.overrides.task)
    values = {"id": cfg.sweep, "overrides": [*given, *hydra], "folder": str(Path.cwd()), "sweep_dir": str(folder)}
    rundir.write_json(folder / RECORD, values)


def leave_report(folder: Path) -> None:
    """Leaves the comparison of what is finished in the sweep's folder."""
    from mft.compare import leave_report

    try:
        leave_report(folder)
    except Exception as error:  # the results are there; a picture less must not look like a failed sweep
        board.say(f"the report could not be written: {type(error).__name__}: {error}")


def _remove_if_unused(folder: Path) -> None:
    """Removes what Hydra leaves of a sweep that did not start."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
        shutil.rmtree(folder)


def _job_return(overrides: Sequence[str], task: Task) -> Any:
    from hydra.core.utils import JobReturn, JobStatus

    done = task.state in ("finished", "skipped", "pruned", "same")
    status = JobStatus.COMPLETED if done else JobStatus.FAILED
    returned = JobReturn(
        overrides=list(overrides), cfg=task.job.cfg, working_dir=str(task.folder), task_name="mft", status=status
    )
    summary = rundir.read_json(task.folder / "summary.json")
    returned.return_value = (
        job.objective(summary) if done else UserError(task.error or f"job {task.job.label}: {task.state}")
    )
    return returned
