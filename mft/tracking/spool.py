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
        self.state: dict[str, Any] = {"uri": None, "run_id": None, "experiment_id": None, "sent": 0, "left": []}
        if self.path.exists():
            self._drop_half_line()
            if self.state_path.exists():
                self.state |= json.loads(self.state_path.read_text(encoding="utf-8"))
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
                except ValueError:  # a disk that was full in the middle of a line
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
        temporary = self.state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=1), encoding="utf-8")
        temporary.replace(self.state_path)

    def _drop_half_line(self) -> None:
        """Cuts a line that a killed process left unfinished; it cannot have been sent."""
        with self.path.open("rb+") as file:
            text = file.read()
            if not text.endswith(b"\n"):
                file.truncate(text.rfind(b"\n") + 1)


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
