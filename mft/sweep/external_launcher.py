"""Jobs of a sweep through the launcher of another package (submitit for SLURM, joblib): checked here, run
there.

Each job is composed again where it runs and has the same folder as with `hydra/launcher=mft`, so that the
same command skips finished jobs and resumes the others.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft import run_folder
from mft.config import plugins
from mft.config.compose import resolved
from mft.config.hydra_compose import with_choices
from mft.config.overrides import key_of
from mft.config.schema import register
from mft.console.screen import say
from mft.files.json_file import read_json
from mft.launch.job import checked, objective
from mft.launch.launch import launch
from mft.launch.signals import INTERRUPTED, Stopped
from mft.run_folder import RunStatus
from mft.sweep import display, pool
from mft.sweep.folder import RECORD, folder_of, is_sweep, job_folder, taken
from mft.sweep.jobs import finish, plan_jobs, require_success
from mft.sweep.pool import SweepJob


class ExternalLauncher:
    """Stands between Hydra's sweeper and a launcher: hands it the jobs that are left, and reads results in
    folders."""

    def __init__(self, launcher: Any, cfg: DictConfig, loader: Any, dry_run: bool):
        self.launcher, self.cfg, self.loader, self.dry_run = launcher, cfg, loader, dry_run

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Returns nothing for Hydra to look at; UserError if any job failed, Stopped after Ctrl-C."""
        jobs = plan_jobs(self.cfg, self.loader, job_overrides, self.dry_run, starts=False)
        waiting = [job for job in jobs if job.state == RunStatus.waiting]
        folder = folder_of(self.cfg)
        with taken(self.cfg, folder):
            display.start(jobs, folder)
            if waiting:
                try:
                    self.launcher.launch([job_overrides[job.number - 1] for job in waiting], initial_job_idx)
                except KeyboardInterrupt:
                    print("\nsubmitted jobs are left to their launcher (scancel ends them)", file=sys.stderr)
                    raise Stopped(signal.SIGINT, INTERRUPTED) from None
                except Exception as error:  # a job ended by its scheduler; how each ended is in its folder
                    say(f"{type(self.launcher).__name__}: {type(error).__name__}: {error}")
            for job in waiting:
                collect_result(job)
            finish(jobs, folder, 0)
        require_success(jobs)
        return []


def collect_result(job: SweepJob) -> None:
    """Reads how a job ended from its folder."""
    job.update()
    if not job.folder.exists():
        return
    state = run_folder.state(job.folder)
    job.state = {RunStatus.killed: RunStatus.failed, RunStatus.running: RunStatus.stopped}.get(state, state)
    if job.state == RunStatus.failed:
        sentence = read_json(job.folder / "log" / "failure.json").text("sentence")
        job.error = sentence or "the process was killed from outside; its launcher's log may show why"


def one_job(cfg: DictConfig) -> float:
    """Runs one job where a launcher has put it; returns its objective. A failure is left in its folder, then
    raised."""
    from hydra.core.hydra_config import HydraConfig

    register()
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir).absolute()
    plugins.name(run_folder.plugins_of(folder, RECORD))
    fixed = {key_of(o) for o in read_json(folder / RECORD).texts("overrides") if not is_sweep(o)}
    # variables stay as they are written
    given: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    overrides = [o for o in given if key_of(o) != "sweep"]
    label = " ".join(o for o in overrides if key_of(o) not in fixed)
    composed = with_choices(cfg, hydra.runtime.choices)
    job = checked(resolved(composed), overrides, label)
    run_dir = job_folder(job, folder)
    try:
        return objective(launch(job, run_dir))
    except Exception as error:
        pool.leave_failure(run_dir, error)
        raise
