"""`mft train -m` and what else needs Hydra's own application: run through it, resume a sweep, explain its
errors."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mft import run_folder
from mft.config import hydra_compose, plugins, schema
from mft.config.messages import explained
from mft.config.overrides import check_overrides, key_of, of_hydra, replaced, with_moved_keys
from mft.config.places import check_folder
from mft.console.credentials import as_written
from mft.console.screen import say
from mft.errors import UserError, nearest
from mft.files.json_file import read_json
from mft.sweep.folder import RECORD, DryRunDone, find_sweep, is_sweep, sweep_id


def through_hydra(
    overrides: Sequence[str], config_dirs: Sequence[Path], flags: Sequence[str], dry_run: bool = False
) -> None:
    """Serves what needs Hydra's own application: `-m` (plugins call `mft.sweep`), `--cfg`, `--info`,
    `--hydra-help`."""
    import hydra
    from hydra.core.plugins import Plugins

    def run_one(cfg: DictConfig) -> float:  # called by the launchers of other packages only
        from mft.sweep.external_launcher import one_job

        return one_job(cfg)

    # Hydra passes this function to our plugins, and nothing else of ours
    run_one.dry_run = dry_run  # type: ignore[attr-defined]
    check_overrides(overrides)
    for override in overrides:
        key, value = key_of(override), override.partition("=")[2]
        if key == "hydra/launcher":
            require_launcher(value)
        elif key == "hydra.sweep.dir" and "${" not in value:
            check_folder(Path(value), key)
    schema.register()
    Plugins.instance()  # registers Hydra's own sweeper, which ours is to replace
    use_own_grid()
    search = hydra_compose.search_path(config_dirs, overrides)
    overrides = hydra_compose.without_search_path(overrides)
    argv = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    try:
        with explained(search, [o for o in overrides if not is_sweep(o)]):
            cfg = hydra_compose.check_sweep([*search, *overrides])
            for flag in flags:
                require_part(cfg, flag.removeprefix("--package=") if "--package=" in flag else "_global_")
            own: list[str] = []
            if "-m" in flags:
                for note in [*replaced(overrides), *of_hydra(overrides, sweep=True)]:
                    say(f"mft: {note}", sys.stderr)
                own = [] if any(key_of(o) == "sweep" for o in overrides) else [f"sweep={sweep_id(overrides)}"]
            sys.argv = ["mft train", *flags, *search, *overrides, *own]
            folder = str(schema.config_dir().resolve())
            application = hydra.main(version_base="1.3", config_path=folder, config_name="config")
            printed = io.StringIO()
            # replaced interpolations may show passwords of the environment
            with redirect_stdout(printed) if "--resolve" in flags else nullcontext():
                application(run_one)()
            sys.stdout.write(as_written(printed.getvalue()))
    except DryRunDone:
        pass
    finally:
        sys.argv = argv


def use_own_grid() -> None:
    """Puts our grid in the place of Hydra's basic sweeper in this process; an experiment can still choose
    another."""
    from hydra.core.config_store import ConfigStore

    node = {"_target_": "hydra_plugins.mft_sweepers.Grid", "max_batch_size": None, "params": None}
    ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=node, provider="mft")


def require_part(cfg: DictConfig, package: str) -> None:
    """Raises UserError for a part of the config that is to be printed and is not there."""
    if package != "_global_" and OmegaConf.select(cfg, package) is None:
        hint = nearest(package, cfg) or "."
        raise UserError(f"--package={package}: the config has no such part{hint} Allowed: {', '.join(cfg)}.")


def require_launcher(launcher: str) -> None:
    """Raises UserError for a launcher that is known not to work, or whose package is missing."""
    if launcher.startswith("ray"):
        raise UserError(
            f"hydra/launcher={launcher}: Ray puts jobs on machines without the run folder or the data, and "
            "hides GPUs from them; use launch.jobs, or hydra/launcher=submitit_slurm on a cluster."
        )
    submitit = "hydra_plugins.hydra_submitit_launcher"
    if launcher.startswith("submitit") and importlib.util.find_spec(submitit) is None:
        raise UserError(f'hydra/launcher={launcher} needs pip install "mft[slurm]"')


def resume(path: Path, overrides: Sequence[str], dry_run: bool = False) -> None:
    """Runs the command of a sweep's folder again, with further overrides, from the folder it was started in.

    path: the sweep's folder, or `multirun/<name>` where it is the only one there.
    """
    folder = find_sweep(path)
    record = read_json(folder / RECORD)
    command = with_moved_keys(record.texts("overrides"))
    started, sweep_dir = record.text("folder"), record.text("sweep_dir")
    if not (command and started and sweep_dir):
        raise UserError(f"{folder / RECORD} is damaged, so the sweep's command is unknown; run it by hand.")
    plugins.name(run_folder.plugins_of(folder, RECORD))
    say(f"resuming: mft train -m {' '.join(command)}")
    if not Path(started).is_dir():
        raise UserError(f"{folder} was started in {started}, which is gone; run its command by hand.")
    # before the change of folder, since `path` may be relative
    moved = [] if Path(sweep_dir).resolve() == folder.resolve() else [f"hydra.sweep.dir={folder.resolve()}"]
    os.chdir(started)
    through_hydra([*command, *overrides, *moved], [], ["-m"], dry_run)
