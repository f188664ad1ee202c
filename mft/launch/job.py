"""One job: from a composed config to a run folder with a finished run in it."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft import run_folder
from mft.config import inputs, plugins
from mft.config.identity import Identity
from mft.config.schema import LaunchMode, freeze, resolve_precision
from mft.config.validate import check
from mft.console.screen import say
from mft.errors import UserError, full_disk
from mft.files.json_file import Values, read_json, write_json
from mft.hardware import visible_gpus
from mft.launch import resume_choice
from mft.launch.failures import forget_failures
from mft.launch.hosts import Hosts
from mft.launch.launch import Stopped, launch, place, ranks, share, warm
from mft.launch.meeting import meet
from mft.launch.spawn import PRELOAD
from mft.launch.worker import SAVED
from mft.objective import criterion, losses_by_task
from mft.training.resume import rewind


@dataclass(frozen=True)
class Job:
    """A checked config and what it is. `cfg` is resolved."""

    cfg: DictConfig
    overrides: list[str]
    world: int
    identity: Identity
    label: str = ""  # what tells it from the other jobs of its sweep
    data: str = ""  # fingerprint of all tasks
    plugins: tuple[str, ...] = ()  # packages named for it beside installed plug-ins

    def judged(self, row: Mapping[str, Any]) -> float | None:
        """Returns the objective (`train.best`) of a row of metrics.jsonl, None where it is no validation."""
        losses = losses_by_task(row)
        if not losses or None in losses.values():
            return None
        weights = {name: task.get("weight", 1.0) for name, task in self.cfg.task.items()}
        return criterion(losses, self.cfg.train.best, dict.fromkeys(losses, 1.0) | weights)

    def choose(self, dated: bool) -> tuple[Path, bool]:
        """Returns (run folder, whether its run is to be resumed), see `resume_choice.choose`."""
        config: Any = OmegaConf.to_container(self.cfg, enum_to_str=True)
        return resume_choice.choose(Path(self.cfg.output_dir), dated, self.cfg.train.resume, self.identity, config)

    def describe(self) -> dict[str, Any]:
        """Returns what is left in its run folder beside the config (`overrides.json`)."""
        return {
            "overrides": self.overrides,
            "label": self.label,
            "sweep": self.cfg.sweep or "",
            "data": self.data,
            "folder": str(Path.cwd()),
            "plugins": list(self.plugins),
        }


def share_of_gpus(nproc: int | str, jobs: int) -> int | str:
    """Returns launch.nproc, with auto = the GPUs of one of `jobs` jobs side by side; UserError if too few."""
    gpus = visible_gpus() if jobs > 1 else 0
    if gpus and str(nproc) == "auto":
        return max(1, gpus // jobs)
    if gpus and str(nproc).isdigit() and jobs * int(nproc) > gpus:
        raise UserError(
            f"launch.jobs={jobs} jobs of launch.nproc={nproc} ranks need more than the {gpus} visible GPUs."
        )
    return nproc


def checked(cfg: DictConfig, overrides: Sequence[str], label: str = "", starts: bool = True) -> Job:
    """Judges a resolved config (UserError with a sentence) and finds out which experiment it is.

    label: what tells the job from the others of its sweep; starts: whether it is to be run by this process (soon).
    Reads the task files once to fingerprint them; loads no model and starts no process.
    """
    cfg.train.precision = resolve_precision(cfg.train.precision)
    launch_settings: Any = OmegaConf.to_object(cfg.launch)
    launch_settings.check()
    world = ranks(share_of_gpus(cfg.launch.nproc, cfg.launch.jobs), cfg.launch.mode.value)
    if cfg.launch.nnodes > 1 and place() is not None:
        raise UserError(
            f"launch.nnodes={cfg.launch.nnodes}: torchrun, accelerate launch or srun has placed this process as one of "
            f"{world} ranks already; leave launch.nnodes out, or start `mft train` once on each machine."
        )
    world *= cfg.launch.nnodes
    components = check(cfg, world)
    if cfg.launch.mode is LaunchMode.processes and starts:
        warm(preload(cfg))  # the fork server imports while the data is read here
    fingerprints = inputs.fingerprints(cfg, components.tasks, components.model, components.peft)
    rows = sorted((name, value) for name, value in fingerprints.items() if name.startswith("task."))
    data = hashlib.sha1(repr(rows).encode()).hexdigest()[:12]
    identity = inputs.identity(cfg, world, [task.name for task in components.tasks], fingerprints)
    return Job(cfg, list(overrides), world, identity, label, data, plugins.named())


def preload(cfg: DictConfig) -> tuple[str, ...]:
    """Returns the modules that the fork server imports for a run."""
    return (*PRELOAD, "deepspeed") if str(cfg.dist._target_).startswith("mft.distributed.deepspeed.") else PRELOAD


def run(job: Job, folder: Path, say: Callable[[str], None] = say, hosts: Hosts | None = None) -> dict[str, Any]:
    """Runs, continues or skips the job in `folder`; returns its summary. Raises what ended the run otherwise.

    A finished run of the same length is skipped; a longer one goes on from its last checkpoint.
    hosts: the machines of the run, of which this is number 0; the others call `follow`.
    """
    placed = place()
    if placed is not None and placed.rank > 0:  # rank 0 chooses the folder and writes it
        if there := share(None):
            start_ranks(job, Path(there))
        return {}
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    if resume_choice.is_finished(folder, job.identity, job.cfg.train.resume):
        share(None)
        if hosts:
            hosts.tell(None)
        say(f"{shown} is finished already; its summary.json says how it went.")
        return read_json(folder / "summary.json")
    held = run_folder.lock(folder)
    try:
        say(f"run folder {shown}")
        if (asked := resume_choice.step_of(job.cfg.train.resume))[0] == folder and asked[1] is not None:
            say(rewind(folder, asked[1]))
        job.cfg.output_dir = str(folder)
        freeze(job.cfg, folder / "config.yaml")
        write_json(folder / "identity.json", job.identity.as_json(), durable=True)
        write_json(folder / "overrides.json", job.describe())
        share(str(folder))
        if hosts:
            forget_failures(folder / "log")
            hosts.tell(folder, hosts.write(folder))
        start_ranks(job, folder, hosts)
    except OSError as error:
        raise full_disk(error, folder) or error from error
    finally:
        held.release()
    return read_json(folder / "summary.json")


def start_ranks(job: Job, folder: Path, hosts: Hosts | None = None) -> None:
    """Runs this machine's ranks of the run in `folder`. Raises what ended it, also a signal to another machine."""
    try:
        launch(
            folder,
            nproc=job.world // job.cfg.launch.nnodes,
            mode=job.cfg.launch.mode.value,
            shutdown_seconds=job.cfg.launch.shutdown_seconds,
            hosts=hosts,
        )
    except UserError as error:
        error.exit_code = 1  # the run had started
        raise
    if hosts and run_folder.status(folder) == "stopped":
        raise Stopped(signal.SIGTERM, SAVED)


@contextmanager
def together(job: Job) -> Iterator[Hosts | None]:
    """The machines of the job, which have met and agree on what they run; None: it has one machine."""
    if job.cfg.launch.nnodes == 1:
        yield None
        return
    settings: Any = OmegaConf.to_object(job.cfg.launch)
    facts = {"launch.nnodes": settings.nnodes, "ranks": job.world // settings.nnodes, "data": job.data}
    facts |= {name: value[:10] for name, value in job.identity.fingerprints.items() if not name.startswith("task.")}
    hosts = meet(settings, facts | {"config": job.identity.extended[:10]})
    try:
        yield hosts
    finally:
        hosts.close()


def follow(job: Job, hosts: Hosts, say: Callable[[str], None] = say) -> None:
    """Runs this machine's ranks in the run folder that host 0 chooses. Raises what ended the run otherwise."""
    folder = hosts.told()
    if folder is None:
        say("the run is finished already.")
        return
    say(f"run folder {folder}, host {hosts.rank} of {len(hosts.names)}")
    start_ranks(job, folder, hosts)


def objective(summary: dict[str, Any]) -> float:
    """Returns what a sweeper minimises: the best validation by train.best, else the last training loss.

    Raises UserError without either.
    """
    values = Values(summary)
    value = values.part("best").get("value", values.get("train/loss"))
    if value is None:
        raise UserError("The run has neither a validation nor a training loss to compare it by.")
    return float(value)
