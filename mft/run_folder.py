"""The run folder: the names in it, the status of its run, its metrics, and the lock of who writes it.

config.yaml · identity.json · overrides.json · plan.json · micro_batch.json · provenance.json · metrics.jsonl ·
summary.json · checkpoints/step-N/ · final/ · sample_losses/ · log/ · report/
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mft.errors import UserError, writable
from mft.files.json_file import read_json

LOCK = ".lock"

MICRO_BATCH = "micro_batch.json"
"""The rows of a micro-batch that train.per_device_batch_size=auto has found, and on which devices."""


class RunStatus(StrEnum):
    """How a run, or a job of a sweep, stands. The first three are written into summary.json by the run
    itself."""

    finished = "finished"
    stopped = "stopped"
    """Asked to stop by a signal; a checkpoint was saved."""
    failed = "failed"
    unfinished = "unfinished"
    """No summary.json, or that of a run that is trained further: it is running, or was killed."""
    running = "running"
    killed = "killed"
    """Not running, and it left no summary of its end."""
    pruned = "pruned"
    """Ended by its sweep because its validation was worse than the other jobs'."""
    waiting = "waiting"
    """A job of a sweep that has not started."""
    skipped = "skipped"
    """A job that an earlier command of its sweep finished."""
    same = "same"
    """A job that is an earlier one of its sweep again."""


def plugins_of(folder: Path, record: str = "overrides.json") -> list[str]:
    """Returns the packages that were named with --plugin for a run, or with its record for a sweep."""
    return read_json(folder / record).texts("plugins")


def status(run_dir: Path) -> RunStatus:
    """Returns the status that a run wrote into its summary: finished, stopped or failed; unfinished without
    one."""
    written = read_json(run_dir / "summary.json").text("status")
    by_itself = (RunStatus.finished, RunStatus.stopped, RunStatus.failed)
    return RunStatus(written) if written in by_itself else RunStatus.unfinished


def state(run_dir: Path) -> RunStatus:
    """Returns how a run stands now: `status`, with the lock telling running from killed."""
    if is_locked(run_dir):
        return RunStatus.running
    written = status(run_dir)
    # Written by the sweep once the job has ended; the job's own summary says `stopped`.
    if written is not RunStatus.finished and (run_dir / "pruned.json").exists():
        return RunStatus.pruned
    return RunStatus.killed if written is RunStatus.unfinished else written


def metric_rows(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows of metrics.jsonl from a byte on, and the byte after the last complete one.

    A file that has become shorter (a resumed run cuts off what it trains again) is read from its start.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            offset = offset if offset <= size else 0
            file.seek(offset)
            text = file.read()
    except OSError:
        return [], 0
    rows = []
    lines = text[: text.rfind(b"\n") + 1]  # the last one may be half written
    for line in lines.splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows, offset + len(lines)


def runs_under(folder: Path) -> list[Path]:
    """Returns the run folders in a folder and below it (or the folder itself), oldest first."""
    runs = []
    for path, folders, files in os.walk(folder):
        if "identity.json" in files:
            runs.append(Path(path))
            folders.clear()  # a run has none below it
        else:
            folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(runs, key=lambda run: (run / "identity.json").stat().st_mtime)


def lock(run_dir: Path) -> FileLock:
    """Takes the run folder for this process; UserError when another process is writing it, or none can."""
    # The system releases it when the process ends, however it ends: no stale lock is left.
    taken = FileLock(writable(run_dir, "output_dir") / LOCK)
    try:
        taken.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{run_dir} is being written by another process; wait for it, or choose another output_dir."
        ) from None
    return taken


def is_locked(folder: Path) -> bool:
    """Whether a process is writing the run folder."""
    if not (folder / LOCK).exists():  # to try it would make the file
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
