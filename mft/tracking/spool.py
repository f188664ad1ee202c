"""The record of a run on its own disk, written before anything is sent, and how much of it a tracker has received."""

from __future__ import annotations

import json
import logging
import math
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mft.files.json_file import read_json, write_json

log = logging.getLogger(__name__)


class Spool:
    """`mlflow.spool.jsonl`: what a run told its tracker, in order; `mlflow.json`: where it goes and what has arrived.

    Records are objects with a `kind` and a `time` (ms): open (key, experiment, run_name, params, tags),
    metrics (step, values), artifact and model (path), close (status). They are never changed or removed, so the whole
    record can be sent again, also to another store. Times are fixed when a record is written: MLflow takes the same
    point (name, step, time, value) twice without doubling it, which makes sending again after a lost answer harmless.

    State: uri, run_id, experiment_id, sent (bytes of the spool that arrived), left (files yet to upload).
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.path = run_dir / "mlflow.spool.jsonl"
        self.state_path = run_dir / "mlflow.json"
        self._reported: set[int] = set()
        self.state: dict[str, Any] = {"uri": None, "run_id": None, "experiment_id": None, "sent": 0, "left": []}
        if self.path.exists():
            self._drop_half_line()
            first = next(self.records(0), None)
            if first is not None and first[0]["kind"] != "open":  # key, experiment and name of the run are in it
                self._set_aside(self.path, "the record that begins a run is damaged")
        if self.path.exists() and self.state_path.exists():
            if (known := self._read_state()) is None:
                self._set_aside(self.state_path, "it is damaged")
            else:
                self.state |= known
                if self.state["sent"] > self.path.stat().st_size:  # a disk has lost the rest
                    self.state["sent"] = 0
        self._lock = threading.Lock()

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record; non-finite numbers become the strings nan, inf, -inf, so that the file is plain JSON."""
        line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def first(self) -> dict[str, Any]:
        """Returns the record that opened the run; its `key` is the run's own name for itself."""
        return next(self.records(0))[0]

    def records(self, start: int | None = None) -> Iterator[tuple[dict[str, Any], int]]:
        """Yields (record, offset behind it) from byte `start` (None = what has not been sent)."""
        offset = self.state["sent"] if start is None else start
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written right now
                offset += len(line)
                try:
                    record = json.loads(line)
                    if not _whole(record):
                        raise ValueError
                except (ValueError, RecursionError):  # a disk that was full in the middle of a line, or is failing
                    if offset not in self._reported:
                        self._reported.add(offset)
                        log.warning("%s: a line before byte %d cannot be read and is left out", self.path, offset)
                    continue
                yield record, offset

    def points_from(self, step: int) -> set[tuple[int, str]]:
        """Returns (step, metric) of every point written for this step or a later one."""
        if not self.path.exists():
            return set()
        metrics = (record for record, _ in self.records(0) if record["kind"] == "metrics" and record["step"] >= step)
        return {(record["step"], name) for record in metrics for name in record["values"]}

    def pending(self) -> bool:
        """Whether something has not arrived."""
        return bool(self.state["left"]) or (self.path.exists() and self.path.stat().st_size > self.state["sent"])

    def save(self) -> None:
        """Writes the state; at any moment the file is the old or the new one."""
        write_json(self.state_path, self.state, durable=True)

    def _read_state(self) -> dict[str, Any] | None:
        """Returns the saved state, None when it is not one."""
        saved = read_json(self.state_path)
        texts = all(isinstance(saved.get(name), str | None) for name in ("uri", "run_id", "experiment_id"))
        sent, left = saved.get("sent"), saved.get("left")
        if not (texts and type(sent) is int and sent >= 0 and isinstance(left, list)):
            return None
        if not all(isinstance(upload, dict) and isinstance(upload.get("path"), str) for upload in left):
            return None
        return {name: saved.get(name) for name in self.state}

    def _set_aside(self, path: Path, why: str) -> None:
        """Renames a damaged file, which is then made anew; tracking is no reason to end a training."""
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        log.warning("%s: %s; set aside as %s, and made anew", path, why, aside.name)

    def _drop_half_line(self) -> None:
        """Cuts a line that a killed process left unfinished; it cannot have been sent."""
        with self.path.open("rb+") as file:
            text = file.read()
            if not text.endswith(b"\n"):
                file.truncate(text.rfind(b"\n") + 1)


FIELDS: dict[str, dict[str, Any]] = {
    "open": {"key": str, "experiment": str, "run_name": str, "params": dict, "tags": dict, "time": int},
    "metrics": {"step": int, "values": dict, "time": int},
    "artifact": {"path": str},
    "model": {"path": str},
    "close": {"status": str, "time": int},
}
"""Of each kind of record: what has to be in it, and of which type."""


def _whole(record: Any) -> bool:
    """Whether a line of the spool is a record as `append` wrote it."""
    if not isinstance(record, dict) or (needed := FIELDS.get(str(record.get("kind")))) is None:
        return False
    if not all(isinstance(record.get(name), kind) for name, kind in needed.items()):
        return False
    values = record["values"].values() if "values" in needed else ()
    return all(isinstance(value, int | float) or value in ("nan", "inf", "-inf") for value in values)


def new_key() -> str:
    return uuid.uuid4().hex


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    try:
        return _plain(float(value))  # numpy scalars, 0-dim tensors
    except (TypeError, ValueError):
        return str(value)
