"""The contract of experiment trackers, the metrics.jsonl of every run, and the fan-out to several."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.errors import UserError
from mft.files.atomic import write_text

log = logging.getLogger(__name__)

TOTAL = "total/"
"""Metrics that begin with this are in one row alone, the last one of a finished run."""


class Tracker:
    """Keeps the record of a run. Only rank 0 has one. Order: open; log, artifact, checkpoint, model; close.

    A tracker never raises into training: what it cannot deliver it reports once as a warning and keeps. Only
    `prepare` and `open` may raise, and only a UserError (a missing package, a malformed address).
    """

    def prepare(self) -> None:
        """Creates what runs share (a database) before jobs start in parallel; one run does without."""

    def open(self, run_dir: Path, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Starts the record of this run, or continues it on resume.

        config: the resolved config, nested; tags: name (short, of the run), identity, git_commit, versions,
        overrides; step: the optimizer step the run resumes from (0 = fresh); points of later steps are logged
        again.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records metrics of one optimizer step; names as in docs/architecture.md, e.g. `valid/loss/<task>`.

        They are in metrics.jsonl of the run folder by then, unless the disk is full.
        """

    def artifact(self, path: Path) -> None:
        """Keeps a file or folder of the run folder; a tracker that reads the run folder may ignore it."""

    def model(self, folder: Path) -> None:
        """Receives the folder of the final model; copies it only if configured to, since it may be large."""

    def checkpoint(self, folder: Path) -> None:
        """Receives the folder of a checkpoint that the run keeps; copies it only if configured to."""

    def close(self, status: str) -> None:
        """Completes the record; status is finished, failed or stopped."""

    def report(self, sweep_dir: Path, file: Path, tags: Mapping[str, str]) -> None:
        """Keeps the report of a sweep, outside of any run; not between open and close."""

    def where(self) -> str:
        """Returns one line on how to look at the record, or ""."""
        return ""


class Jsonl(Tracker):
    """`metrics.jsonl` in the run folder: one object a logged step, `{"step": 10, "train/loss": 1.23, ...}`.

    On resume the lines of steps after the checkpoint are cut off, so that no step appears twice, and so is
    the last line of a run that had finished and is extended; a run that starts afresh in its folder starts a
    new file. Non-finite values are written as null, which every JSON reader understands. Rows that meet a
    full disk stay in memory and are written with a later row, or when the run ends.
    """

    def open(self, run_dir: Path, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._unwritten: list[str] = []
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n") if step else ():
            try:
                row = json.loads(line)
                if row["step"] <= step and not any(name.startswith(TOTAL) for name in row):
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # half a line, as a kill leaves it; its step is trained and logged again
        write_text(self.path, "".join(line + "\n" for line in kept))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._unwritten.append(json.dumps(row) + "\n")
        self._write()

    def close(self, status: str) -> None:
        self._write()

    def _write(self) -> None:
        """Appends all unwritten rows or none: half a line would spoil the one that follows."""
        if not self._unwritten:
            return
        with self.path.open("ab", buffering=0) as file:
            end, text = file.seek(0, os.SEEK_END), "".join(self._unwritten).encode()
            try:
                if file.write(text) != len(text):  # unbuffered: a disk that fills up takes a part of it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(end)
                raise
        self._unwritten.clear()


class FanOut(Tracker):
    """Passes every call to several trackers in turn; one that fails is reported once and stops no other."""

    def __init__(self, trackers: Sequence[Tracker]):
        self.trackers = list(trackers)
        self.reported: set[int] = set()

    def prepare(self) -> None:
        for tracker in self.trackers:
            tracker.prepare()

    def open(self, run_dir: Path, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        self._each(lambda tracker: tracker.open(run_dir, config, tags, step), ending=UserError)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def artifact(self, path: Path) -> None:
        self._each(lambda tracker: tracker.artifact(path))

    def model(self, folder: Path) -> None:
        self._each(lambda tracker: tracker.model(folder))

    def checkpoint(self, folder: Path) -> None:
        self._each(lambda tracker: tracker.checkpoint(folder))

    def close(self, status: str) -> None:
        self._each(lambda tracker: tracker.close(status))

    def where(self) -> str:
        return "\n".join(line for line in (tracker.where() for tracker in self.trackers) if line)

    def _each(self, call: Callable[[Tracker], None], ending: type[Exception] | tuple[()] = ()) -> None:
        for tracker in self.trackers:
            try:
                call(tracker)
            except ending:
                raise
            except Exception as error:  # a full disk, a defect in a tracker: not a reason to lose a training
                if id(tracker) not in self.reported:
                    self.reported.add(id(tracker))
                    names = type(tracker).__name__, type(error).__name__
                    log.warning("%s: %s: %s. Training continues", *names, error)
