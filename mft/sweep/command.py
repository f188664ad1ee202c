"""A sweep as a command and a folder: what Hydra is asked, how the sweep is named, how it is gone on with."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft import run_folder
from mft.config import plugins
from mft.config.hydra_compose import check_sweep, search_path, without_search_path
from mft.config.inputs import CANNOT_CHANGE_THE_RESULT, under
from mft.config.messages import explain, of_defaults, refusals
from mft.config.overrides import check_overrides, key_of, of_hydra, replaced
from mft.config.schema import config_dir, register
from mft.config.yaml_file import circle
from mft.console.credentials import as_written
from mft.console.screen import say
from mft.errors import UserError
from mft.files.json_file import read_json, write_json

IDENTITY_DIGITS = 10
"""Digits of an identity that name a folder: in a million jobs two collide with a probability below one half."""

RECORD = "sweep.json"
"""In the sweep's folder: the command that made it, so that it can be gone on with."""

IN_THE_ID = ("batch_size", "gradient_accumulation_steps")
"""Parts of keys that name a sweep though they are not, as such, part of a run's identity."""


class Shown(Exception):
    """Raised by a dry run when everything is printed, through Hydra, to its caller."""


def through_hydra(
    overrides: Sequence[str], config_dirs: Sequence[Path], flags: Sequence[str], dry_run: bool = False
) -> None:
    """Serves what needs Hydra's own application: `-m` (plugins call `mft.sweep`), `--cfg`, `--info`, `--hydra-help`."""
    import hydra
    from hydra.core.plugins import Plugins

    from hydra_plugins.mft_sweepers import grids_are_ours

    def run_one(cfg: DictConfig) -> float:  # called by the launchers of other packages only
        from mft.sweep.external_launcher import one_job

        return one_job(cfg)

    run_one.dry_run = dry_run  # type: ignore[attr-defined]  # Hydra hands this function to our plugins, which look
    check_overrides(overrides)
    for override in overrides:
        if key_of(override) == "hydra/launcher":
            refuse(override.partition("=")[2])
    register()
    Plugins.instance()  # Hydra's own are registered first
    grids_are_ours()
    search: list[str] = []
    kept_argv, kept_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting, so that we can say it better
    try:
        search = search_path(config_dirs, overrides)
        overrides = without_search_path(overrides)
        check_sweep([*search, *overrides])
        ours = []
        if "-m" in flags or "--multirun" in flags:
            for note in [*replaced(overrides), *of_hydra(overrides, sweep=True)]:
                say(f"mft: {note}", sys.stderr)
            ours = [] if any(key_of(o) == "sweep" for o in overrides) else [f"sweep={sweep_id(overrides)}"]
        sys.argv = ["mft train", *flags, *search, *overrides, *ours]
        application = hydra.main(version_base="1.3", config_path=str(config_dir().resolve()), config_name="config")
        if "--resolve" in flags:  # what is printed then has the values of environment variables in it
            with redirect_stdout(io.StringIO()) as printed:
                application(run_one)()
            sys.stdout.write(as_written(printed.getvalue()))
        else:
            application(run_one)()
    except Shown:
        pass
    except RecursionError:
        raise UserError(circle()) from None
    except refusals() as error:
        raise UserError(explain(error, search, [o for o in overrides if not is_sweep(o)])) from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        if (said := of_defaults(error)) is None:
            raise
        raise UserError(said) from error
    finally:
        sys.argv = kept_argv
        if kept_full is None:
            del os.environ["HYDRA_FULL_ERROR"]


def refuse(launcher: str) -> None:
    """Raises UserError for a launcher that is known not to work, or whose package is missing."""
    if launcher.startswith("ray"):
        raise UserError(
            f"hydra/launcher={launcher}: Ray puts jobs on machines where the run folder and the data need not be, and "
            "hides GPUs from them; use launch.jobs on one machine, or hydra/launcher=submitit_slurm on a cluster."
        )
    if launcher.startswith("submitit") and importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise UserError(f'hydra/launcher={launcher} needs a package that is not installed: pip install "mft[slurm]"')


def resume(place: Path, overrides: Sequence[str], dry_run: bool) -> None:
    """Runs the command of a sweep's folder again, with further overrides, from the folder it was started in."""
    folder = the_sweep(place)
    record = read_json(folder / RECORD)
    given, started, sweep_dir = record.texts("overrides"), record.text("folder"), record.text("sweep_dir")
    if not (given and started and sweep_dir):
        raise UserError(f"{folder / RECORD} is damaged, so the sweep's command is not known; run it by hand.")
    plugins.name(run_folder.plugins_of(folder, RECORD))
    say(f"resuming: mft train -m {' '.join(given)}")
    if not Path(started).is_dir():
        raise UserError(f"{folder} was started in {started}, which is gone; run its command by hand.")
    os.chdir(started)
    here = [] if Path(sweep_dir).resolve() == folder.resolve() else [f"hydra.sweep.dir={folder.resolve()}"]
    through_hydra([*given, *overrides, *here], [], ["-m"], dry_run)


def the_sweep(folder: Path) -> Path:
    """Returns the sweep folder meant by `multirun/<name>/<id>` or, with one sweep in it, by `multirun/<name>`."""
    if (folder / RECORD).exists():
        return folder
    found = sorted(path.parent for path in folder.glob(f"*/{RECORD}"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{folder} is not a sweep: it has no {RECORD}.")
    raise UserError(f"{folder} holds {len(found)} sweeps, name one of them: {', '.join(str(path) for path in found)}.")


def sweep_id(overrides: Sequence[str]) -> str:
    """Returns the hash of what is not swept, so that values can be added to an axis and all jobs keep their folders.

    What only says how jobs run (launch, tracking, logging) has no part in it.
    """
    kept = [o for o in overrides if not _says_how(key_of(o))]
    fixed = sorted(o for o in kept if not is_sweep(o))
    axes = sorted(key_of(o) for o in kept if is_sweep(o))
    return hashlib.sha1(repr((fixed, axes)).encode()).hexdigest()[:IDENTITY_DIGITS]


def _says_how(name: str) -> bool:
    if any(part in name for part in IN_THE_ID):
        return False
    if name.startswith("hydra.") or name == "hydra/launcher":
        return True
    return under(name, CANNOT_CHANGE_THE_RESULT)


def is_sweep(override: str) -> bool:
    """Whether an override names several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


@contextmanager
def taken(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Holds a sweep's folder for this process and keeps the command in it, the newest one, after values were added."""
    try:
        held = run_folder.lock(folder)
    except UserError:
        raise UserError(f"{folder}: this sweep is running already, in another process.") from None
    try:
        given: Any = OmegaConf.to_container(cfg.hydra.overrides, resolve=False)  # variables stay as they are written
        hydra = [o for o in given["hydra"] if key_of(o) != "hydra.mode"]
        values = {"overrides": [*given["task"], *hydra], "folder": str(Path.cwd()), "sweep_dir": str(folder)}
        write_json(folder / RECORD, {"id": cfg.sweep, "plugins": list(plugins.named())} | values)
        yield
    finally:
        held.release()


def remove_if_unused(folder: Path) -> None:
    """Removes what Hydra leaves of a sweep that did not start."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
        shutil.rmtree(folder)
