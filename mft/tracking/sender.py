"""Sends a run folder to an MLflow store: everything after the saved position, in batches, each point once.

The run's own files are the record (metrics.jsonl, config.yaml, summary.json, report/), so one sender serves
a run that is training and `mft tracking sync` long after it. A kill between sending a batch and saving its
place is mended by asking the store: when it has the run already, its points are read, and none is sent twice.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from mft.console.credentials import as_written, filled, hidden, without_credentials
from mft.errors import UserError
from mft.run_folder import metric_rows, status
from mft.tracking.note import note
from mft.tracking.params import TAG_LIMIT, cut, flattened, safe_name
from mft.tracking.record import NAME, Record, read_config
from mft.tracking.store import artifact_root, database_file, prepare, reason
from mft.tracking.uploads import Uploads
from mft.tracking.view import VIEW, VIEW_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

METRIC_FILES = ("metrics.jsonl", "system.jsonl")
METRICS_A_CALL = 1000  # MLflow's own limits of one log_batch
TEXTS_A_CALL = 100
LOCK_SECONDS = 4.0  # to wait for another sender of the same folder
NOTE, NOTE_DIGEST = "mlflow.note.content", "mlflow.note.digest"  # the page hides the second
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Sender:
    """Sends one run folder to one store. `send` takes the folder's lock; the caller releases it."""

    client: MlflowClient

    def __init__(self, run_dir: Path, record: Record, uri: str):
        self.run_dir, self.record, self.uri = run_dir, record, uri
        self.lock = FileLock(run_dir / "mlflow.lock", thread_local=False)
        self.attached = False
        self.experiment_id = ""
        self.moved = 0.0  # when something last arrived, or the time until which silence is expected
        self._waiting: dict[str, tuple[list[Metric], list[int]]] = {}  # file → points, place behind
        self._sent: dict[str, set[int]] | None = None  # metric → steps that the store has
        self._tags: dict[str, str] | None = None  # those that have arrived
        self._noted = ""  # the outcome that the run's description speaks of
        kept = as_written(without_credentials(uri))
        if record.uri != kept:
            record.restart(kept)

    def send(self, outcome: str = "") -> int:
        """Sends what is left and returns the number of points and files; raises what the store raises.

        outcome: how the run ended; empty = it is still running.
        """
        self.lock.acquire(timeout=LOCK_SECONDS)
        try:
            if not self.attached:
                self._attach()
            if self._tags is not self.record.tags or self._noted != outcome:
                self._describe(outcome)
            count = sum(self._send_points(name) for name in METRIC_FILES)
            # Behind the points, so that a run which is shown as finished has all of them.
            if outcome and self.record.ended != outcome:
                files = [self.run_dir / name for name in ("metrics.jsonl", "summary.json")]  # written last
                end = max((file.stat().st_mtime for file in files if file.exists()), default=time.time())
                self.client.set_terminated(self.record.run_id, STATUS[outcome], end_time=int(1000 * end))
                self.record.ended = outcome
                self.record.save(self.run_dir)
            return count + Uploads(self.client, self.run_dir, self.record, self._alive).send()
        except Exception:
            self.attached = False  # the store may come back without the run
            raise

    def _alive(self, seconds: float = 0.0) -> None:
        self.moved = time.monotonic() + seconds

    # ---- the run ----

    def _attach(self) -> None:
        """Finds the run in the store, or creates it."""
        from mlflow.exceptions import MlflowException

        database, record = database_file(self.uri), self.record
        if database is not None:
            self._alive(10.0 if database.exists() else 60.0)
        # {}: ask for each metric which points the store has. None, below: a run created now has none.
        self.client, self._tags, self._sent = prepare(self.uri), None, {}
        if record.run_id:
            try:
                info = self.client.get_run(record.run_id).info
                self.attached, self.experiment_id = info.lifecycle_stage == "active", info.experiment_id
            except MlflowException as error:  # the run or the database may have been deleted
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if self.attached:
            return
        record.restart(record.uri)
        self._waiting.clear()
        self.experiment_id = self._experiment()
        # A run whose creation was never answered is found by its key.
        runs = list(self.client.search_runs([self.experiment_id], f"tags.run_key = '{record.key}'"))
        if not runs:
            tags = {"run_key": record.key, "mlflow.source.name": "mft", "mlflow.source.type": "LOCAL"}
            with contextlib.suppress(KeyError, OSError):  # a container whose user id has no name
                tags["mlflow.user"] = getpass.getuser()
            started, name = record.started or None, record.run_name or None
            runs, self._sent = [self.client.create_run(self.experiment_id, started, tags, name)], None
        record.run_id, self.attached = runs[0].info.run_id, True
        record.save(self.run_dir)

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name, database = self.record.experiment, database_file(self.uri)
        folder = None if database is None else (artifact_root(database).resolve() / safe_name(name)).as_uri()
        try:
            return str(self.client.create_experiment(name, folder, {VIEW_TAG: VIEW}))
        except MlflowException:
            experiment = self.client.get_experiment_by_name(name)  # it exists: the usual case
            if experiment is None:
                raise
        if VIEW_TAG not in experiment.tags:  # one that a person has changed stays
            self.client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, VIEW)
        if experiment.lifecycle_stage == "deleted":
            self.client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _describe(self, outcome: str) -> None:
        """Sends parameters, tags and description.

        MLflow replaces no parameter: one that a resume changed is a tag. A description that a person has
        edited stays: it has another digest than ours had.
        """
        from mlflow.entities import Param, RunTag

        now, run_id = self.record.tags, self.record.run_id
        run, config, tags = self.client.get_run(run_id), read_config(self.run_dir), dict(now)
        if run.info.status != "RUNNING" and not self.record.ended:
            self.client.update_run(run_id, status="RUNNING")
        choices, there = config.get("choices") or {}, run.data.params
        params = flattened(config) | {str(name): str(value) for name, value in choices.items()}
        for name, value in params.items():
            if there.get(name, value) != value:
                tags[f"changed.{name}"] = f"{there[name]} -> {value}"
        text, shown = note(self.run_dir, outcome, config), run.data.tags.get(NOTE, "")
        if text and (not shown or _digest(shown) == run.data.tags.get(NOTE_DIGEST)):
            tags |= {NOTE: text, NOTE_DIGEST: _digest(text)}
        new = [Param(name, value) for name, value in params.items() if name not in there]
        texts = [RunTag(safe_name(name), cut(value, TAG_LIMIT)) for name, value in tags.items()]
        for start in range(0, max(len(new), len(texts)), TEXTS_A_CALL):
            part = slice(start, start + TEXTS_A_CALL)
            self.client.log_batch(run_id, params=new[part], tags=texts[part])
            self._alive()
        self._tags, self._noted = now, outcome

    # ---- metrics ----

    def _send_points(self, name: str) -> int:
        """Sends the rows of a file behind its place.

        A batch that failed waits unchanged: MLflow keeps a point (name, step, time, value) once, however
        often it is sent, so a lost answer does no harm. Read again, its points would get other times.
        """
        if name not in self._waiting and (self.run_dir / name).exists():
            self._waiting[name] = self._read(self.run_dir / name)
        points, place = self._waiting.get(name, ([], []))
        for start in range(0, len(points), METRICS_A_CALL):
            self.client.log_batch(self.record.run_id, metrics=points[start : start + METRICS_A_CALL])
            self._alive()
        if place and place != self.record.places.get(name):
            self.record.places = {**self.record.places, name: place}
            self.record.save(self.run_dir)
        self._waiting.pop(name, None)
        return len(points)

    def _read(self, path: Path) -> tuple[list[Metric], list[int]]:
        """Returns (points that the store lacks, the place behind them); null is NaN, a gap in the chart.

        Rows carry no time: they are spread between the last row before them and the file's last change. That
        is right to half a second in a run that is training, and a fair guess after an outage.
        """
        from mlflow.entities import Metric

        file = path.stat()
        inode, offset, since = self.record.places.get(path.name, [0, 0, self.record.started])
        rows, offset = metric_rows(path, offset if inode == file.st_ino else 0)
        points, last, spread = [], since, max(int(file.st_mtime * 1000) - since, 0)
        for number, row in enumerate(rows, 1):
            last, step = since + spread * number // len(rows), row.pop("step")
            for metric, value in row.items():
                value = math.nan if value is None else value
                if isinstance(value, int | float) and not self._has(metric, step):
                    points.append(Metric(safe_name(metric), value, last, step))
        return points, [file.st_ino, offset, last]

    def _has(self, name: str, step: int) -> bool:
        """Whether the store has a point. It is asked once a metric, and not at all for a run created here."""
        if self._sent is not None and name not in self._sent:
            history = self.client.get_metric_history(self.record.run_id, safe_name(name))
            self._sent[name] = {point.step for point in history}
        return self._sent is not None and step in self._sent[name]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sync(run_dir: Path, uri: str = "") -> tuple[int, bool]:
    """Sends what the store of a run lacks; returns (points and files sent, whether it was marked as failed).

    uri: the store's address; empty = where the run was sent to. That is kept without credentials: a store
    that needs them takes the address again, MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and _PASSWORD.
    Another store than the run's receives all of it. A run that left no outcome was killed, and is marked as
    failed. Raises UserError where there is nothing to send or the store does not take it.
    """
    if not (run_dir / NAME).exists():
        raise UserError(f"{run_dir}: no {NAME} here; this run was not tracked with tracking=mlflow")
    record, environment = Record.read(run_dir), os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:  # the variable may hold the password of the same store
        uri = environment if without_credentials(environment) == record.uri else record.uri
    if not uri:
        raise UserError(f"{run_dir}: its MLflow store is not recorded; give the address with --uri")
    if not record.started:  # damaged, or written by an earlier version and never sent
        record.experiment = str(read_config(run_dir).get("name") or record.experiment)
        record.run_name = run_dir.resolve().name
    outcome = record.outcome or status(run_dir)
    killed = outcome not in STATUS
    marked = killed and record.ended != "failed"
    try:
        sender = Sender(run_dir, record, filled(uri))
    except KeyError as error:
        raise UserError(f"{run_dir}: {uri} needs {error} in the environment, which is not set") from error
    try:
        return sender.send("failed" if killed else outcome), marked
    except Timeout as error:
        raise UserError(f"{run_dir}: another process is sending this run") from error
    except Exception as error:
        why = reason(error, sender.uri)
        raise UserError(f"{run_dir} was not sent to {hidden(uri)}: {why}. Nothing is lost.") from error
    finally:
        sender.lock.release(force=True)
