"""Jobs of a sweep through another package's launcher (submitit for SLURM, joblib): checked here, run there.

Each job is composed again where it runs and has the same folder as with `hydra/launcher=mft`, so that the
same command skips finished jobs and resumes the others.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from mft.config import hydra_compose, plugins, schema
from mft.config.compose import resolved
from mft.config.overrides import key_of
from mft.console.screen import say
from mft.files.json_file import read_json
from mft.launch import launch, signals
from mft.launch.job import checked, objective
from mft.run_folder import RunStatus, plugins_of, state
from mft.sweep import names, supervisor
from mft.sweep.folder import RECORD, SweepContext, is_sweep, job_folder
from mft.sweep.jobs import carry_out, plan_jobs
from mft.sweep.pool import SweepJob

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.plugins.launcher import Launcher


class ExternalLauncher:
    """Stands between Hydra's sweeper and a launcher: passes on the unfinished jobs, and reads their results
    from their folders."""

    def __init__(self, launcher: Launcher, context: SweepContext):
        self.launcher, self.context = launcher, context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Returns nothing, so Hydra has nothing to check; UserError if any job failed, Stopped after
        Ctrl-C."""

        def submit(waiting: Sequence[SweepJob]) -> int:
            # job_overrides as they came: a launcher composes each job itself, on the machine that runs it
            try:
                self.launcher.launch([job_overrides[job.number - 1] for job in waiting], initial_job_idx)
            except KeyboardInterrupt:
                print("\nsubmitted jobs are left to their launcher (scancel ends them)", file=sys.stderr)
                raise signals.Stopped(signal.SIGINT, signals.INTERRUPTED) from None
            except Exception as error:  # a job ended by its scheduler; how each job ended is in its folder
                say(f"{type(self.launcher).__name__}: {type(error).__name__}: {error}")
            for job in waiting:
                collect_result(job)
            return 0

        carry_out(self.context, plan_jobs(self.context, job_overrides, starts=False), submit)
        return []


def collect_result(job: SweepJob) -> None:
    """Reads how a job ended from its folder."""
    job.update()
    if not job.folder.exists():
        return
    how = state(job.folder)
    # running: its launcher returned without waiting for it
    job.state = {RunStatus.killed: RunStatus.failed, RunStatus.running: RunStatus.stopped}.get(how, how)
    if job.state == RunStatus.failed:
        sentence = read_json(job.folder / "log" / "failure.json").text("sentence")
        job.error = sentence or "the process was killed from outside; its launcher's log may show why"


def one_job(cfg: DictConfig) -> float:
    """Runs one job where a launcher has put it; returns its objective. A failure is written to its folder,
    then raised."""
    from hydra.core.hydra_config import HydraConfig

    schema.register()
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir).absolute()
    plugins.name(plugins_of(folder, RECORD))
    fixed = {key_of(o) for o in read_json(folder / RECORD).texts("overrides") if not is_sweep(o)}
    # unresolved, as in `taken`: they are written to the run folder
    of_job: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    overrides = [o for o in of_job if key_of(o) != "sweep"]
    label = " ".join(o for o in overrides if key_of(o) not in fixed)
    composed = hydra_compose.with_choices(cfg, hydra.runtime.choices)
    search = hydra_compose.recorded_places(map(str, hydra.searchpath))
    job = checked(resolved(composed), overrides, label, search=search)
    run_dir = job_folder(job, folder)
    job = dataclasses.replace(job, name=names.recorded(folder).get(run_dir.name, ""))
    try:
        return objective(launch.launch(job, run_dir))
    except Exception as error:
        supervisor.leave_failure(run_dir, error)
        raise
