"""A sweep's folder: its id, the names of its jobs' folders, its lock, and the command recorded in it.

`multirun/<name>/<sweep id>/` holds sweep.json, jobs.txt, a run folder for every job, and the report.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from mft import run_folder
from mft.config import plugins
from mft.config.identity import VERSION, identity_of
from mft.config.inputs import CANNOT_CHANGE_THE_RESULT, under
from mft.config.overrides import key_of
from mft.errors import UserError
from mft.files.json_file import read_json, write_json
from mft.launch.job import Job

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader

IDENTITY_DIGITS = 10
"""Digits of an identity that name a folder: in a million jobs two collide with a probability below one
half."""

RECORD = "sweep.json"
"""In the sweep's folder: the command that created it, so that it can be resumed."""

IN_THE_ID = ("batch_size", "gradient_accumulation_steps")
"""Parts of keys that name a sweep though they are not, as such, part of a run's identity."""


class DryRunDone(Exception):
    """Raised by a dry run when everything is printed, through Hydra, to its caller."""


@dataclass(frozen=True)
class SweepContext:
    """A sweep as Hydra passes it to our plugins."""

    cfg: DictConfig
    """The sweep's own config, with Hydra's node."""
    loader: ConfigLoader
    """Composes the jobs."""
    dry_run: bool
    """Whether to stop once all jobs are checked, and print what would run."""

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(self.cfg.hydra.sweep.dir).absolute()


def job_folder(job: Job, folder: Path) -> Path:
    """Returns the run folder of a job in a sweep's folder; the same whoever launches it."""
    return folder / job.identity.extended[:IDENTITY_DIGITS]


def find_sweep(folder: Path) -> Path:
    """Returns the sweep folder meant by `multirun/<name>/<id>` or, where it is the only one, by
    `multirun/<name>`."""
    inside = sorted(path.parent for path in folder.glob(f"*/{RECORD}"))
    sweeps = [folder] if (folder / RECORD).exists() else inside
    if not sweeps:
        raise UserError(f"{folder} is not a sweep: it has no {RECORD}.")
    if len(sweeps) > 1:
        raise UserError(f"{folder} holds {len(sweeps)} sweeps; name one of: {', '.join(map(str, sweeps))}.")
    return sweeps[0]


def sweep_id(overrides: Sequence[str]) -> str:
    """Returns the hash of what is not swept, so that values can be added to an axis and all jobs keep their
    folders.

    Overrides of how jobs run (launch, tracking, logging) do not enter.
    """
    kept = []
    for override in overrides:
        name = key_of(override)
        how = name.startswith("hydra.") or name == "hydra/launcher" or under(name, CANNOT_CHANGE_THE_RESULT)
        if not how or any(part in name for part in IN_THE_ID):
            kept.append(override)
    # sorted: the order of a command line means nothing
    fixed = sorted(o for o in kept if not is_sweep(o))
    axes = sorted(key_of(o) for o in kept if is_sweep(o))
    return hashlib.sha1(repr((fixed, axes)).encode()).hexdigest()[:IDENTITY_DIGITS]


def is_sweep(override: str) -> bool:
    """Whether an override names several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


@contextmanager
def checking(folder: Path) -> Iterator[None]:
    """Context of all that precedes the first job; removes what Hydra leaves of a sweep that does not start.

    Raises UserError for a sweep whose jobs another version of mft wrote: their folders are named by another
    identity, so finished jobs would run again beside them.
    """
    for run in run_folder.runs_under(folder) if folder.is_dir() else ():
        identity = identity_of(run)
        if identity is not None and identity.version != VERSION:
            raise UserError(
                f"{os.path.relpath(folder)} holds jobs that another version of mft wrote "
                f"{identity.numbers()}, so this sweep cannot be resumed; mft runs, show, compare, merge "
                "and generate still read them. Add sweep=NAME to the command to run it anew beside them."
            )
    try:
        yield
    except (UserError, DryRunDone):
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
            shutil.rmtree(folder)
            for parent in folder.absolute().parents:
                if not parent.is_relative_to(Path.cwd()) or parent == Path.cwd() or any(parent.iterdir()):
                    break  # a person's own, or not empty
                parent.rmdir()
        raise


@contextmanager
def taken(cfg: DictConfig, folder: Path, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Holds a sweep's folder for this process and records the command there: the newest one, when values were
    added.

    names: {folder: name} of the jobs, for those that another package's launcher starts.
    """
    try:
        lock = run_folder.lock(folder)
    except UserError:
        raise UserError(f"{folder}: this sweep is already running, in another process.") from None
    try:
        # unresolved: what ${oc.env:…} stands for, a password perhaps, is not written
        overrides: Any = OmegaConf.to_container(cfg.hydra.overrides, resolve=False)
        of_hydra = [o for o in overrides["hydra"] if key_of(o) != "hydra.mode"]
        record: dict[str, Any] = {
            "id": cfg.sweep,
            "plugins": list(plugins.named()),
            "folder": str(Path.cwd()),
        }
        record |= {"overrides": [*overrides["task"], *of_hydra], "sweep_dir": str(folder)}
        record["names"] = read_json(folder / RECORD).part("names") | dict(names or {})
        write_json(folder / RECORD, record)
        yield
    finally:
        lock.release()
