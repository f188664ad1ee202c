"""Sends a run's spool to an MLflow store: in order, in batches, each thing once, and from where it stopped."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from mft.console.credentials import as_written, filled, hidden, without_credentials
from mft.errors import UserError
from mft.tracking.params import TAG_LIMIT, cut, safe_name
from mft.tracking.spool import Spool
from mft.tracking.store import artifact_root, client_for, database_file, prepare

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

METRICS_A_CALL = 1000  # MLflow's own limits of one log_batch
TEXTS_A_CALL = 100
RECORDS_A_ROUND = 500
SLOW_DISK = 5e6  # bytes a second that an upload is given before it counts as stuck
TEXT_FILES = {".yaml", ".yml", ".json", ".jsonl", ".txt", ".log", ".md", ".html", ".csv"}
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Delivery:
    """Sends one spool to one store. `alive(seconds)` is called before whatever may be silent for that long."""

    def __init__(self, spool: Spool, uri: str, alive: Callable[[float], None] = lambda seconds: None):
        self.spool = spool
        self.state = spool.state
        self.uri = uri
        self.alive = alive
        self.client: MlflowClient | None = None
        kept = as_written(without_credentials(uri))
        if self.state["uri"] != kept:  # the first time, or another store than last time
            self.state |= {
                "uri": kept,
                "run_id": None,
                "experiment_id": None,
                "sent": 0,
                "left": [],
            }

    def send(self) -> int:
        """Sends everything that is left and returns the number of records and files; raises what the store raises."""
        count = 0
        self._attach()
        while batch := list(itertools.islice(self.spool.records(), RECORDS_A_ROUND)):
            for is_metrics, group in itertools.groupby(batch, key=lambda item: item[0]["kind"] == "metrics"):
                records = list(group)
                if is_metrics:
                    self._metrics([record for record, _ in records])
                else:
                    for record, _ in records:
                        self._record(record)
                count += len(records)
                self.state["sent"] = records[-1][1]
                self.spool.save()
                self.alive(0)
        return count + self._files()

    # ---- the run ----

    def _attach(self) -> None:
        """Finds the run of this spool in the store, or creates it."""
        if self.client is not None:
            return
        database = database_file(self.uri)
        if database is not None:
            self.alive(10.0 if database.exists() else 60.0)
        from mlflow.exceptions import MlflowException

        prepare(self.uri)
        client = client_for(self.uri)
        first = self.spool.first()
        if self.state["run_id"] is not None:
            try:
                if client.get_run(self.state["run_id"]).info.lifecycle_stage != "active":
                    self.state["run_id"] = None
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self.state["run_id"] = None  # the run or the database was deleted
        if self.state["run_id"] is None:
            experiment = self._experiment(client, first["experiment"])
            # A run whose creation was never answered, or whose mlflow.json is gone, is found by its key.
            found = client.search_runs([experiment], f"tags.run_key = '{first['key']}'", max_results=1)
            run = found[0] if found else self._create(client, experiment, first)
            self.state |= {"experiment_id": experiment, "run_id": run.info.run_id, "sent": 0, "left": []}
            self.spool.save()
        self.client = client

    def _experiment(self, client: MlflowClient, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            database = database_file(self.uri)
            location = None if database is None else (artifact_root(database).resolve() / safe_name(name)).as_uri()
            try:
                return client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                experiment = client.get_experiment_by_name(name)  # another job was a moment faster
                if experiment is None:
                    raise error
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id

    def _create(self, client: MlflowClient, experiment: str, first: Mapping[str, Any]) -> Any:
        tags = {"run_key": first["key"], "mlflow.source.name": "mft", "mlflow.source.type": "LOCAL"}
        with contextlib.suppress(KeyError, OSError):  # a container whose user id has no name
            tags["mlflow.user"] = getpass.getuser()
        return client.create_run(experiment, start_time=first["time"], tags=tags, run_name=first["run_name"])

    # ---- records ----

    def _record(self, record: Mapping[str, Any]) -> None:
        assert self.client is not None
        kind, run_id = record["kind"], self.state["run_id"]
        if kind == "open":
            self._open(record)
        elif kind in ("artifact", "model"):
            self.state["left"].append({key: record[key] for key in ("path", "register") if key in record})
        elif kind == "close":
            self.client.set_terminated(run_id, STATUS.get(record["status"], "FAILED"), end_time=record["time"])

    def _open(self, record: Mapping[str, Any]) -> None:
        """Parameters and tags; a parameter that is another on resume cannot be changed, it becomes a tag."""
        from mlflow.entities import Param, RunTag

        assert self.client is not None
        run_id = self.state["run_id"]
        run = self.client.get_run(run_id)
        if run.info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        there = run.data.params
        tags = dict(record["tags"])
        for name, value in record["params"].items():
            if there.get(name, value) != value:
                tags[safe_name(f"changed.{name}")] = f"{there[name]} -> {value}"
        params = [Param(name, value) for name, value in record["params"].items() if name not in there]
        for chunk in _chunks(params, TEXTS_A_CALL):
            self.client.log_batch(run_id, params=chunk)
            self.alive(0)
        texts = [RunTag(safe_name(name), cut(str(value), TAG_LIMIT)) for name, value in tags.items()]
        for chunk in _chunks(texts, TEXTS_A_CALL):
            self.client.log_batch(run_id, tags=chunk)

    def _metrics(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Points in batches. NaN is kept: a gap in the chart. So is infinity, which MLflow would draw as 1.8e308."""
        from mlflow.entities import Metric

        assert self.client is not None
        metrics = []
        for record in records:
            for name, value in record["values"].items():
                if value in ("inf", "-inf"):
                    log_name = safe_name(f"infinite.{name}")
                    self.client.set_tag(self.state["run_id"], log_name, f"{value}, last at step {record['step']}")
                    value = "nan"
                metrics.append(Metric(safe_name(name), float(value), record["time"], record["step"]))
        for chunk in _chunks(metrics, METRICS_A_CALL):
            self._log_metrics(chunk)
            self.alive(0)

    def _log_metrics(self, metrics: list[Metric]) -> None:
        """One call; where the store refuses a point for good, halves, so that only that point is left out."""
        from mlflow.exceptions import MlflowException

        assert self.client is not None
        try:
            self.client.log_batch(self.state["run_id"], metrics=metrics)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            if len(metrics) == 1:
                log.warning("MLflow refuses %s at step %d: %s", metrics[0].key, metrics[0].step, hidden(str(error)))
                return
            self._log_metrics(metrics[: len(metrics) // 2])
            self._log_metrics(metrics[len(metrics) // 2 :])

    # ---- files ----

    def _files(self) -> int:
        """Uploads the files that are left. They come last and one that fails holds up nothing but itself."""
        failed: Exception | None = None
        uploads = list(self.state["left"])
        for upload in uploads:
            try:
                self._upload(upload)
            except Exception as error:  # a store for artifacts may be down or lack a package while metrics go through
                failed = error
                continue
            self.state["left"].remove(upload)
            self.spool.save()
            self.alive(0)
        if failed is not None:
            raise failed
        return len(uploads)

    def _upload(self, upload: Mapping[str, Any]) -> None:
        assert self.client is not None
        run_id = self.state["run_id"]
        source = self.spool.run_dir / upload["path"]
        base = source.parent.relative_to(self.spool.run_dir) if source.is_relative_to(self.spool.run_dir) else Path()
        if not source.exists():
            log.warning("%s is gone and is not kept in MLflow", source)
            return
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if file.is_file():
                self.alive(file.stat().st_size / SLOW_DISK)
                self._file(run_id, file, (base / file.relative_to(source.parent)).as_posix())
        if upload.get("register"):
            self._register(upload["register"], run_id, (base / source.name).as_posix())

    def _file(self, run_id: str, file: Path, name: str) -> None:
        assert self.client is not None
        folder = name.rpartition("/")[0] or None
        if file.suffix in TEXT_FILES:
            text = file.read_text(encoding="utf-8", errors="replace")
            if hidden(text) != text:
                self.client.log_text(run_id, hidden(text), name)
                return
        self.client.log_artifact(run_id, str(file), folder)

    def _register(self, name: str, run_id: str, path: str) -> None:
        """Adds a version of a registered model that points at this run's copy of it."""
        from mlflow.exceptions import MlflowException

        assert self.client is not None
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{path}"
        self.client.create_model_version(name, source, run_id=run_id)


def sync(run_dir: Path, uri: str | None = None) -> int:
    """Sends what a run has recorded and its MLflow store has not received; returns the number of records and files.

    uri: the store's address; None = where the run sent to (kept without credentials: for a store that wants them give
    the address, or for a server MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD). Another store than the run's
    receives the whole run. Raises UserError where there is nothing to send or the store does not take it.
    """
    if not (run_dir / "mlflow.spool.jsonl").exists():
        raise UserError(f"{run_dir}: no mlflow.spool.jsonl here; this run was not tracked with tracking=mlflow")
    lock = FileLock(run_dir / "mlflow.lock", timeout=5)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{run_dir}: this run is still going and sends its record itself") from error
    try:
        spool = Spool(run_dir)
        uri = uri or spool.state["uri"]
        if uri is None:
            raise UserError(f"{run_dir}: its MLflow store is not known; give the address (tracking.mlflow.uri)")
        try:
            return Delivery(spool, filled(uri)).send()
        except KeyError as error:
            raise UserError(f"{run_dir}: the environment variable {error} is not set, and {uri} reads it") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{hidden(str(uri))} does not take the run: {cause(error)}; nothing is lost") from error
    finally:
        lock.release()


def mark_killed(run_dir: Path) -> bool:
    """Ends the record of a run whose process is gone without a word as failed; returns whether there was need to."""
    spool = Spool(run_dir)
    last = None
    for record, _ in spool.records(0):
        if record["kind"] in ("open", "close"):
            last = record["kind"]
    if last != "open":
        return False
    spool.append({"kind": "close", "status": "failed", "time": int(spool.path.stat().st_mtime * 1000)})
    return True


def cause(error: Exception) -> str:
    """Returns the first line of what went wrong, short and without credentials."""
    return f"{type(error).__name__}: {cut(hidden(str(error)).strip().splitlines()[0] if str(error) else '', 200)}"


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
