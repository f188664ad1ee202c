"""One job: from a composed config to a run folder with a finished run in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mft import rundir
from mft.build import ALLOWED_TARGETS, build, check
from mft.config import LaunchMode, Precision, fast_precision, freeze, identity
from mft.data.task import all_tasks
from mft.errors import UserError
from mft.launch import launch, ranks, warm


@dataclass(frozen=True)
class Job:
    """A checked config and what it is. `cfg` is resolved."""

    cfg: DictConfig
    overrides: list[str]
    world: int
    identity: rundir.Identity
    allow_targets: tuple[str, ...] = ()


def checked(cfg: DictConfig, overrides: Sequence[str]) -> Job:
    """Judges a resolved config (UserError with a sentence) and finds out which experiment it is.

    Reads the task files once to fingerprint them; loads no model and starts no process.
    """
    allow_targets = tuple(cfg.train.allow_targets)
    if cfg.train.precision is Precision.auto:
        cfg.train.precision = fast_precision()
    world = ranks(cfg.launch.nproc, cfg.launch.mode.value)
    check(cfg, world, allow_targets)
    allowed = (*ALLOWED_TARGETS, *allow_targets)
    chosen = {name: build(cfg.task[name], f"task.{name}", allowed) for name in cfg.task}
    tasks = all_tasks(chosen, list(cfg.data.paths))
    if cfg.launch.mode is LaunchMode.processes:
        warm()  # the fork server imports while the data is read here
    fingerprints = {f"task.{task.name}": task.fingerprint(cfg.cache_dir) for task in tasks}
    fingerprints["model"] = build(cfg.model, "model", allowed).fingerprint()
    return Job(
        cfg,
        list(overrides),
        world,
        rundir.Identity(identity(cfg, world, fingerprints), identity(cfg, world, fingerprints, extended=False)),
        allow_targets,
    )


def run(job: Job, folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs, continues or skips the job in `folder`; returns its summary. Raises what ended the run otherwise.

    A finished run of the same length is skipped; a longer one goes on from its last checkpoint.
    """
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    if rundir.is_finished(folder, job.identity):
        say(f"{shown} is finished already; its summary.json says how it went.")
        return rundir.read_json(folder / "summary.json")
    held = rundir.lock(folder)
    try:
        say(f"run folder {shown}")
        job.cfg.output_dir = str(folder)
        freeze(job.cfg, folder / "config.yaml")
        job.identity.write(folder)
        rundir.write_json(folder / "overrides.json", {"overrides": job.overrides})
        launch(
            folder,
            nproc=job.world,
            mode=job.cfg.launch.mode.value,
            shutdown_seconds=job.cfg.launch.shutdown_seconds,
            allow_targets=job.allow_targets,
        )
    finally:
        held.release()
    return rundir.read_json(folder / "summary.json")


def objective(summary: dict[str, Any]) -> float:
    """Returns what a sweeper minimises: the best validation by train.best, else the last training loss.

    Raises UserError without either.
    """
    value = summary.get("best", {}).get("value", summary.get("train/loss"))
    if value is None:
        raise UserError("The run has neither a validation nor a training loss to compare it by.")
    return float(value)
