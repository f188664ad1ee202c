"""Sweeps: all jobs are checked before the first starts, every job has the folder of its identity, and a failure ends nothing but its job."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mft import job, rundir
from mft.build import resolved
from mft.compose import absolute_paths, explain
from mft.config import config_dir, register, typed
from mft.errors import UserError

IDENTITY_DIGITS = 10
"""Digits of a job's identity that name its folder: 2 jobs of a million-job sweep collide with a probability below one half."""


def through_hydra(overrides: Sequence[str], config_dirs: Sequence[Path], flags: Sequence[str]) -> None:
    """Serves what needs Hydra's own application: `-m` (the launcher calls `run_jobs`), `--cfg`, `--info`, `--hydra-help`."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    search = (
        [f"hydra.searchpath=[{','.join('file://' + str(f.resolve()) for f in config_dirs)}]"] if config_dirs else []
    )
    kept_argv, kept_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["mft train", *flags, *search, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting, so that we can say it better
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir().resolve()), config_name="config")(_only_swept)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, search, [o for o in overrides if not _is_sweep(o)])) from error
    finally:
        sys.argv = kept_argv
        if kept_full is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _only_swept(cfg: DictConfig) -> None:
    raise AssertionError("single runs do not go through Hydra's application")


def _is_sweep(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


def sweep_folder(cfg: DictConfig) -> Path:
    """Returns `multirun/<name>/<id>`; the id is a hash of what is not swept, so that values can be added to an axis."""
    fixed = sorted(o for o in cfg.hydra.overrides.task if not _is_sweep(o))
    axes = sorted(o.split("=", 1)[0] for o in cfg.hydra.overrides.task if _is_sweep(o))
    digest = hashlib.sha1(repr((fixed, axes)).encode()).hexdigest()[:IDENTITY_DIGITS]
    return Path(cfg.hydra.sweep.dir).absolute() / digest


def checked_jobs(cfg: DictConfig, loader: Any, job_overrides: Sequence[Sequence[str]]) -> list[job.Job]:
    """Composes and checks every job; UserError names the first one that cannot run, before any starts."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    OverridesParser.create()
    jobs = []
    for overrides in job_overrides:
        try:
            composed = loader.load_sweep_config(cfg, list(overrides))
            with open_dict(composed):
                task_overrides = list(composed.hydra.overrides.task)
                del composed["hydra"]
            jobs.append(job.checked(absolute_paths(typed(resolved(composed))), task_overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"job {' '.join(overrides)}: {explain(error, [], overrides)}") from error
        except UserError as error:
            raise UserError(f"job {' '.join(overrides)}: {error}") from error
    return jobs


def run_jobs(cfg: DictConfig, loader: Any, job_overrides: Sequence[Sequence[str]]) -> list[Any]:
    """Runs the jobs of a sweep one after another and returns Hydra's JobReturn of each.

    Finished jobs are skipped and unfinished ones resumed. A failed job leaves its traceback in its folder and the next one
    runs; at the end a table says what became of each, and UserError is raised if any failed.
    """
    jobs = checked_jobs(cfg, loader, job_overrides)
    folder = sweep_folder(cfg)
    print(f"sweep {os.path.relpath(folder)}: {len(jobs)} jobs")
    rows, returns = [], []
    for number, (current, overrides) in enumerate(zip(jobs, job_overrides, strict=True), start=1):
        run_dir = folder / current.identity.extended[:IDENTITY_DIGITS]
        skipped = rundir.is_finished(run_dir, current.identity)
        print(f"\njob {number}/{len(jobs)}  {' '.join(overrides)}")
        error: Exception | None = None
        value = None
        try:
            value = job.objective(job.run(current, run_dir))
        except Exception as caught:
            error = caught
            print(f"mft: this job failed: {caught}", file=sys.stderr)
            log = run_dir / "log"
            log.mkdir(parents=True, exist_ok=True)
            (log / "traceback.txt").write_text("".join(traceback.format_exception(caught)), encoding="utf-8")
        state = "failed" if error else "skipped (finished before)" if skipped else rundir.status(run_dir)
        rows.append((" ".join(overrides), state, value, os.path.relpath(run_dir)))
        returns.append(_job_return(overrides, current.cfg, run_dir, value, error))
    _print_table(rows)
    failed = sum(row[1] == "failed" for row in rows)
    if failed:
        raise UserError(
            f"{failed} of {len(rows)} jobs failed; the same command again retries them and skips the others."
        )
    return returns


def _job_return(
    overrides: Sequence[str], cfg: DictConfig, run_dir: Path, value: float | None, error: Exception | None
) -> Any:
    from hydra.core.utils import JobReturn, JobStatus

    status = JobStatus.FAILED if error else JobStatus.COMPLETED
    returned = JobReturn(overrides=list(overrides), cfg=cfg, working_dir=str(run_dir), task_name="mft", status=status)
    returned.return_value = error if error else value
    return returned


def _print_table(rows: Sequence[tuple[str, str, float | None, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Sweep", title_justify="left")
    for column in ("job", "state", "objective", "folder"):
        table.add_column(column, overflow="fold")
    for overrides, state, value, folder in rows:
        table.add_row(overrides, state, "" if value is None else f"{value:.4f}", folder)
    Console().print(table)
