"""A job: a checked config and the identity of its experiment. `mft.launch.launch` runs it."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.config import inputs, plugins
from mft.config.identity import Identity
from mft.config.inputs import under
from mft.config.overrides import key_of
from mft.config.schema import Launch, LaunchMode, resolve_precision
from mft.config.validate import check
from mft.console.short_names import ROOM, short_names
from mft.errors import UserError
from mft.files.json_file import Values
from mft.launch import placement, resume_choice, spawn
from mft.objective import criterion, losses_by_task


@dataclass(frozen=True)
class Job:
    """A checked config and the identity of its experiment."""

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
    search: tuple[str, ...] = ()
    """Folders of yaml files beside conf/ and those of plug-ins, and packages as pkg://…"""
    name: str = ""
    """Tells it apart in legends; "" for a run outside of sweeps, which gets one when it starts."""

    def judged(self, row: Mapping[str, Any]) -> float | None:
        """Returns the objective (`train.best`) of a row of metrics.jsonl, None unless it is a validation."""
        losses = losses_by_task(row)
        if not losses or None in losses.values():
            return None
        weights = {name: task.get("weight", 1.0) for name, task in self.cfg.task.items()}
        return criterion(losses, self.cfg.train.best, dict.fromkeys(losses, 1.0) | weights)

    def choose(self, dated: bool) -> tuple[Path, bool]:
        """Returns (run folder, whether its run is to be resumed), see `resume_choice.choose`.

        dated: whether output_dir is the default, named by the date.
        """
        config: Any = OmegaConf.to_container(self.cfg, enum_to_str=True)
        output_dir, resume = Path(self.cfg.output_dir), self.cfg.train.resume
        return resume_choice.choose(output_dir, dated, resume, self.identity, config)

    def describe(self, earlier: str = "") -> dict[str, Any]:
        """Returns the content of overrides.json in its run folder; earlier: the name that is there."""
        return {
            "overrides": self.overrides,
            "name": self.name or earlier or self._own_name(),
            "label": self.label,
            "sweep": self.cfg.sweep or "",
            "data": self.data,
            "folder": str(Path.cwd()),
            "plugins": list(self.plugins),
            "search": list(self.search),
        }

    def _own_name(self) -> str:
        """Returns a short name from what the command line sets, and the time, since a run may be repeated."""
        left_out = ("hydra", *inputs.CANNOT_CHANGE_THE_RESULT, *inputs.FINGERPRINTED)
        pairs = [(key_of(override), override.partition("=")[2]) for override in self.overrides]
        settings = {key: value for key, value in pairs if not under(key.replace("/", "."), left_out)}
        clock = time.strftime(" %H%M%S")
        room = ROOM - len(clock)
        return f"{short_names([settings or {'name': str(self.cfg.name)}], room=room)[0]}{clock}"


def checked(
    cfg: DictConfig,
    overrides: Sequence[str],
    label: str = "",
    starts: bool = True,
    search: Sequence[str] = (),
) -> Job:
    """Checks a resolved config (UserError with a sentence) and returns it with its identity.

    label: what distinguishes the job from the others of its sweep; starts: whether this process is about to
    run it; search: see `Job`. Reads the task files once to fingerprint them; loads no model and starts no
    rank.
    """
    cfg = copy.deepcopy(cfg)  # the caller keeps what it composed
    cfg.train.precision = resolve_precision(cfg.train.precision)
    settings = OmegaConf.to_object(cfg.launch)
    assert isinstance(settings, Launch)
    settings.check()
    # the number of ranks decides accumulation, and so enters the checks and the identity
    world = placement.ranks(settings.nproc, settings.mode, settings.jobs)
    if settings.nnodes > 1 and placement.detect_rank() is not None:
        raise UserError(
            f"launch.nnodes={settings.nnodes}: this process is already one of {world} ranks of torchrun, "
            "accelerate launch or srun; leave launch.nnodes out, or start `mft train` once on each machine."
        )
    world *= settings.nnodes
    components = check(cfg, world)
    if settings.mode is LaunchMode.processes and starts:
        deepspeed = str(cfg.dist._target_).startswith("mft.distributed.deepspeed.")
        # the fork server imports while the data is read here
        spawn.start_fork_server((*spawn.PRELOAD, "deepspeed") if deepspeed else spawn.PRELOAD)
    fingerprints = inputs.fingerprints(cfg, components.tasks, components.model, components.peft)
    of_tasks = sorted((name, value) for name, value in fingerprints.items() if name.startswith("task."))
    data = hashlib.sha1(repr(of_tasks).encode()).hexdigest()[:12]
    identity = inputs.identity(cfg, world, [task.name for task in components.tasks], fingerprints)
    return Job(cfg, list(overrides), world, identity, label, data, plugins.named(), tuple(search))


def objective(summary: dict[str, Any]) -> float:
    """Returns what a sweeper minimises: the best validation by train.best, else the last training loss.

    summary: of a finished run. Raises UserError without either.
    """
    value = Values(summary).part("best").get("value", summary.get("train/loss"))
    if value is None:
        raise UserError("The run has neither a validation nor a training loss to compare it by.")
    return float(value)
