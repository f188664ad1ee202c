"""Jobs of a sweep through the launcher of another package (submitit for SLURM, joblib): checked here, run there.

Each job is composed again where it runs and has the same folder as with `hydra/launcher=mft`, so that the same command
skips finished jobs and goes on with the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft import run_folder
from mft.config import plugins
from mft.config.compose import absolute_paths
from mft.config.hydra_compose import with_choices
from mft.config.interpolations import replaced
from mft.config.overrides import key_of
from mft.config.schema import register, typed
from mft.files.json_file import read_json
from mft.launch import job
from mft.launch.launch import Stopped
from mft.launch.worker import INTERRUPTED
from mft.sweep import display, pool
from mft.sweep.command import IDENTITY_DIGITS, RECORD, is_sweep, taken
from mft.sweep.jobs import finish, folder_of, judge, planned
from mft.sweep.pool import Task


class Elsewhere:
    """Stands between Hydra's sweeper and a launcher: hands it the jobs that are left, and judges by their folders."""

    def __init__(self, launcher: Any, cfg: DictConfig, loader: Any, dry_run: bool):
        self.launcher, self.cfg, self.loader, self.dry_run = launcher, cfg, loader, dry_run

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Returns nothing for Hydra to look at; UserError if any job failed, Stopped after Ctrl-C."""
        tasks = planned(self.cfg, self.loader, job_overrides, self.dry_run, starts=False)
        waiting = [task for task in tasks if task.state == "waiting"]
        folder = folder_of(self.cfg)
        with taken(self.cfg, folder):
            display.start(tasks, folder)
            if waiting:
                try:
                    self.launcher.launch([job_overrides[task.number - 1] for task in waiting], initial_job_idx)
                except KeyboardInterrupt:
                    print("\nsubmitted jobs are left to their launcher (scancel ends them)", file=sys.stderr)
                    raise Stopped(2, INTERRUPTED) from None
                except Exception as error:  # a job ended by its scheduler; what became of each is in its folder
                    display.say(f"{type(self.launcher).__name__}: {type(error).__name__}: {error}")
            for task in waiting:
                look_back(task)
            finish(tasks, folder, 0)
        judge(tasks)
        return []


def look_back(task: Task) -> None:
    """Finds out what became of a job."""
    task.look()
    if not task.folder.exists():
        return
    state = run_folder.state(task.folder)
    task.state = {"killed": "failed", "running": "stopped"}.get(state, state)
    told = read_json(task.folder / "log" / "failure.json").text("sentence")
    task.error = "" if task.state != "failed" else told or "its process was ended from outside without a word"


def one_job(cfg: DictConfig) -> float:
    """Runs one job where a launcher has put it; returns its objective. A failure is left in its folder, then raised."""
    from hydra.core.hydra_config import HydraConfig

    register()
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir).absolute()
    plugins.name(run_folder.plugins_of(folder, RECORD))
    fixed = {key_of(o) for o in read_json(folder / RECORD).texts("overrides") if not is_sweep(o)}
    given: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # variables stay as they are written
    overrides = [o for o in given if key_of(o) != "sweep"]
    label = " ".join(o for o in overrides if key_of(o) not in fixed)
    composed = with_choices(cfg, hydra.runtime.choices)
    current = job.checked(absolute_paths(typed(replaced(composed))), overrides, label)
    run_dir = folder / current.identity.extended[:IDENTITY_DIGITS]
    try:
        return job.objective(job.run(current, run_dir))
    except Exception as error:
        pool.leave_failure(run_dir, error)
        raise
