"""`mft train -m` and what else needs Hydra's own application: run through it, resume a sweep, explain its
errors."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from omegaconf import DictConfig

from mft import run_folder
from mft.config import plugins
from mft.config.hydra_compose import check_sweep, search_path, without_search_path
from mft.config.messages import explained
from mft.config.overrides import check_overrides, key_of, of_hydra, replaced, with_moved_keys
from mft.config.schema import config_dir, register
from mft.console.credentials import as_written
from mft.console.screen import say
from mft.errors import UserError
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

    run_one.dry_run = dry_run  # type: ignore[attr-defined]  # Hydra hands this function to our plugins, which look
    check_overrides(overrides)
    for override in overrides:
        if key_of(override) == "hydra/launcher":
            require_launcher(override.partition("=")[2])
    register()
    Plugins.instance()  # Hydra's own are registered first
    use_own_grid()
    search = search_path(config_dirs, overrides)
    overrides = without_search_path(overrides)
    kept_argv, kept_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Hydra then raises instead of printing and exiting, and `explained` says it better.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with explained(search, [o for o in overrides if not is_sweep(o)]):
            check_sweep([*search, *overrides])
            own: list[str] = []
            if "-m" in flags or "--multirun" in flags:
                for note in [*replaced(overrides), *of_hydra(overrides, sweep=True)]:
                    say(f"mft: {note}", sys.stderr)
                own = [] if any(key_of(o) == "sweep" for o in overrides) else [f"sweep={sweep_id(overrides)}"]
            sys.argv = ["mft train", *flags, *search, *overrides, *own]
            application = hydra.main(
                version_base="1.3", config_path=str(config_dir().resolve()), config_name="config"
            )
            if "--resolve" in flags:  # what is printed then has the values of environment variables in it
                with redirect_stdout(io.StringIO()) as printed:
                    application(run_one)()
                sys.stdout.write(as_written(printed.getvalue()))
            else:
                application(run_one)()
    except DryRunDone:
        pass
    finally:
        sys.argv = kept_argv
        if kept_full is None:
            del os.environ["HYDRA_FULL_ERROR"]


def use_own_grid() -> None:
    """Puts our grid in the place of Hydra's basic sweeper in this process; an experiment can still choose
    another."""
    from hydra.core.config_store import ConfigStore

    node = {"_target_": "hydra_plugins.mft_sweepers.Grid", "max_batch_size": None, "params": None}
    ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=node, provider="mft")


def require_launcher(launcher: str) -> None:
    """Raises UserError for a launcher that is known not to work, or whose package is missing."""
    if launcher.startswith("ray"):
        raise UserError(
            f"hydra/launcher={launcher}: Ray puts jobs on machines where the run folder and the data need "
            "not be, and hides GPUs from them; use launch.jobs on one machine, or "
            "hydra/launcher=submitit_slurm on a cluster."
        )
    if (
        launcher.startswith("submitit")
        and importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None
    ):
        raise UserError(
            f'hydra/launcher={launcher} needs a package that is not installed: pip install "mft[slurm]"'
        )


def resume(place: Path, overrides: Sequence[str], dry_run: bool = False) -> None:
    """Runs the command of a sweep's folder again, with further overrides, from the folder it was started in.

    place: the sweep's folder, or `multirun/<name>` where it is the only one there.
    """
    folder = find_sweep(place)
    record = read_json(folder / RECORD)
    given, started, sweep_dir = (
        with_moved_keys(record.texts("overrides")),
        record.text("folder"),
        record.text("sweep_dir"),
    )
    if not (given and started and sweep_dir):
        raise UserError(f"{folder / RECORD} is damaged, so the sweep's command is not known; run it by hand.")
    plugins.name(run_folder.plugins_of(folder, RECORD))
    say(f"resuming: mft train -m {' '.join(given)}")
    if not Path(started).is_dir():
        raise UserError(f"{folder} was started in {started}, which is gone; run its command by hand.")
    os.chdir(started)
    moved = [] if Path(sweep_dir).resolve() == folder.resolve() else [f"hydra.sweep.dir={folder.resolve()}"]
    through_hydra([*given, *overrides, *moved], [], ["-m"], dry_run)
