"""A job: a composed config, checked, and which experiment it is. `mft.launch.launch` runs it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.config import inputs, plugins
from mft.config.identity import Identity
from mft.config.schema import LaunchMode, resolve_precision
from mft.config.validate import check
from mft.errors import UserError
from mft.files.json_file import Values
from mft.hardware import visible_gpus
from mft.launch import resume_choice
from mft.launch.placement import detect_rank, ranks
from mft.launch.spawn import PRELOAD, start_fork_server
from mft.objective import criterion, losses_by_task


@dataclass(frozen=True)
class Job:
    """A checked config and which experiment it is."""

    cfg: DictConfig
    """Resolved: without interpolations, but for those of environment variables."""
    overrides: list[str]
    """The command line it was composed from."""
    world: int
    """Ranks on all machines."""
    identity: Identity
    """Hash of all its inputs."""
    label: str = ""
    """What distinguishes it from the other jobs of its sweep: the swept overrides."""
    data: str = ""
    """Fingerprint of all tasks, 12 hex digits."""
    plugins: tuple[str, ...] = ()
    """Packages named with --plugin, beside installed plug-ins."""

    def judged(self, row: Mapping[str, Any]) -> float | None:
        """Returns the objective (`train.best`) of a row of metrics.jsonl, None where it is no validation."""
        losses = losses_by_task(row)
        if not losses or None in losses.values():
            return None
        weights = {name: task.get("weight", 1.0) for name, task in self.cfg.task.items()}
        return criterion(losses, self.cfg.train.best, dict.fromkeys(losses, 1.0) | weights)

    def choose(self, dated: bool) -> tuple[Path, bool]:
        """Returns (run folder, whether its run is to be resumed), see `resume_choice.choose`.

        dated: whether output_dir was made up from the date.
        """
        config: Any = OmegaConf.to_container(self.cfg, enum_to_str=True)
        return resume_choice.choose(
            Path(self.cfg.output_dir), dated, self.cfg.train.resume, self.identity, config
        )

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
    """Checks a resolved config (UserError with a sentence) and finds out which experiment it is.

    label: what distinguishes the job from the others of its sweep; starts: whether this process is about to
    run it. Reads the task files once to fingerprint them; loads no model and starts no rank.
    """
    cfg = copy.deepcopy(cfg)  # the caller keeps what it composed
    cfg.train.precision = resolve_precision(cfg.train.precision)
    launch_settings: Any = OmegaConf.to_object(cfg.launch)
    launch_settings.check()
    world = ranks(share_of_gpus(cfg.launch.nproc, cfg.launch.jobs), cfg.launch.mode.value)
    if cfg.launch.nnodes > 1 and detect_rank() is not None:
        raise UserError(
            f"launch.nnodes={cfg.launch.nnodes}: torchrun, accelerate launch or srun has placed this "
            f"process as one of "
            f"{world} ranks already; leave launch.nnodes out, or start `mft train` once on each machine."
        )
    world *= cfg.launch.nnodes
    components = check(cfg, world)
    if cfg.launch.mode is LaunchMode.processes and starts:
        start_fork_server(preload(cfg))  # the fork server imports while the data is read here
    fingerprints = inputs.fingerprints(cfg, components.tasks, components.model, components.peft)
    rows = sorted((name, value) for name, value in fingerprints.items() if name.startswith("task."))
    data = hashlib.sha1(repr(rows).encode()).hexdigest()[:12]
    identity = inputs.identity(cfg, world, [task.name for task in components.tasks], fingerprints)
    return Job(cfg, list(overrides), world, identity, label, data, plugins.named())


def preload(cfg: DictConfig) -> tuple[str, ...]:
    """Returns the modules that the fork server imports for a run."""
    return (
        (*PRELOAD, "deepspeed")
        if str(cfg.dist._target_).startswith("mft.distributed.deepspeed.")
        else PRELOAD
    )


def objective(summary: dict[str, Any]) -> float:
    """Returns what a sweeper minimises: the best validation by train.best, else the last training loss.

    Raises UserError without either.
    """
    values = Values(summary)
    value = values.part("best").get("value", values.get("train/loss"))
    if value is None:
        raise UserError("The run has neither a validation nor a training loss to compare it by.")
    return float(value)
