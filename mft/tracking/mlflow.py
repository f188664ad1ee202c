"""Tracking with MLflow: training does not wait for the store, gets no error from it, and nothing logged is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from mft.console.credentials import filled, hidden, without_credentials
from mft.errors import UserError, nearest
from mft.tracking.base import Tracker
from mft.tracking.delivery import Delivery, cause
from mft.tracking.params import cut, flattened
from mft.tracking.spool import Spool, new_key
from mft.tracking.store import database_file, prepare

log = logging.getLogger(__name__)

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
PATIENCE = 4.0  # seconds without any progress after which open and close stop waiting
COLLECT = 0.5  # seconds in which points gather before they are sent in one call
RETRY = (1.0, 60.0)  # seconds until a store that did not answer is tried again: doubled each time, at most
# MLflow's page opens on traces of language model apps, which are empty here; this opens the charts of all runs.
CHARTS = "compareRunsMode=CHART&workflowType=machine_learning"
SYSTEM_EVERY = 10.0  # seconds between two looks at cpu, memory, disk, network and gpu


@dataclass
class Mlflow(Tracker):
    """Records a run in an MLflow store: a local SQLite database (the default) or a server.

    Everything is appended to the run folder's spool first and sent by a background thread; a store that is down costs
    the seconds of PATIENCE at the start and at the end, and what it missed is sent when it answers again, by this
    process, by the resumed run, or by `sync`. A run opened again in the same folder goes on as the same MLflow run.
    """

    public_name: ClassVar[str] = "mlflow"

    uri: str | None = None
    store: str = "."
    experiment: str = "default"
    run_name: str | None = None
    system_metrics: bool = False
    register_as: str | None = None
    checkpoints: bool = False

    def __post_init__(self) -> None:
        if self.uri is None or self.uri == "databricks":
            return
        scheme = self.uri.partition("://")[0].partition("+")[0] if "://" in self.uri else ""
        if scheme not in SCHEMES:
            raise UserError(
                f"tracking.mlflow.uri: {hidden(self.uri)!r} is no address MLflow can write to; allowed are "
                f"http(s)://host:port, sqlite:///path/mlflow.db and other databases ({', '.join(SCHEMES)})"
                f"{nearest(scheme, SCHEMES) if scheme else ''}"
            )
        if scheme == "sqlite" and not self.uri.startswith("sqlite:///"):
            raise UserError(f"tracking.mlflow.uri: {hidden(self.uri)!r} needs three slashes: sqlite:///path/mlflow.db")

    def prepare(self) -> None:
        try:
            prepare(self._address())
        except Exception as error:
            log.warning("MLflow's database could not be prepared: %s", cause(error))

    def open(self, run_dir: Path, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        self._spool = Spool(run_dir)
        self._seen = self._spool.points_from(step)  # trained again after a resume; the store has or gets the first ones
        resumed = self._spool.path.exists()
        self._uri = self._address(self._spool.state["uri"])
        self._delivery = Delivery(self._spool, self._uri, self._alive)
        self._spool.save()  # `sync` has to know the store, also one that is never reached
        self._news = threading.Condition()
        self._asked, self._hurry = threading.Event(), threading.Event()
        self._moved, self._failures = time.monotonic(), 0
        self._answers = True  # until an attempt fails
        self._closing = self._over = self._broken = False
        tags = {name: hidden(str(value)) for name, value in tags.items()}
        if "git_commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git_commit"]  # the page's column Version
        if resumed:
            tags["resumed_from_step"] = str(step)
        try:
            self._key = self._spool.first()["key"] if resumed else new_key()
        except StopIteration:  # killed within its first record
            self._key = new_key()
        self._append(
            {
                "kind": "open",
                "key": self._key,
                "experiment": self.experiment,
                "run_name": cut(self.run_name or tags.get("job") or run_dir.resolve().name, 200),
                "params": flattened(config) | {f"{k}": str(v) for k, v in config.get("choices", {}).items()},
                "tags": tags,
            }
        )
        if (run_dir / "config.yaml").exists():
            self.artifact(run_dir / "config.yaml")
        self._worker = threading.Thread(target=self._send_on, name="mlflow", daemon=True)
        self._worker.start()
        self._wait()
        if self.system_metrics:
            threading.Thread(target=self._watch_system, name="mlflow-system", daemon=True).start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in values.items() if (step, name) not in self._seen}
        if values:
            self._append({"kind": "metrics", "step": step, "values": values})

    def artifact(self, path: Path) -> None:
        self._append({"kind": "artifact", "path": self._relative(path)})

    def model(self, folder: Path) -> None:
        if self.register_as:
            self._append({"kind": "model", "path": self._relative(folder), "register": self.register_as})

    def checkpoint(self, folder: Path) -> None:
        if self.checkpoints:
            self.artifact(folder)

    def report(self, sweep_dir: Path, file: Path, tags: Mapping[str, str]) -> None:
        """Keeps it as a run in an experiment of reports: beside the others it would be in the legend of every chart."""
        name = f"report of sweep {tags['sweep']}"
        named = replace(self, experiment=f"{self.experiment} reports", run_name=name, system_metrics=False)
        named.open(sweep_dir, {}, tags)
        named.artifact(file)
        named.close("finished")

    def close(self, status: str) -> None:
        self._append({"kind": "close", "status": status})
        self._closing = True  # only now: the thread ends when the run is closing and nothing is left
        self._asked.set()
        self._hurry.set()
        self._wait(PATIENCE if self._answers else PATIENCE / 4)
        self._over = True
        self._asked.set()
        self._hurry.set()
        if not self._spool.pending():
            self._worker.join(PATIENCE)  # it notes what was sent and lets go of the folder, which may be opened again
        else:
            log.warning(
                "MLflow (%s) has not received all of this run; nothing is lost, `mft tracking sync %s` sends it",
                hidden(self._uri),
                self._spool.run_dir,
            )

    def where(self) -> str:
        uri = getattr(self, "_uri", self._address())
        local = database_file(uri) is not None
        command = f"mlflow ui --backend-store-uri {uri} --host 127.0.0.1 --port 5000" if local else ""
        state = self._spool.state if hasattr(self, "_spool") else {}
        if not state.get("experiment_id") or not (local or uri.startswith("http")):
            return command or without_credentials(uri)
        server = "http://127.0.0.1:5000" if local else without_credentials(uri)
        page = f"{server}/#/experiments/{state['experiment_id']}/runs?{CHARTS}"
        return f"{command}  then open {page}" if local else page

    # ---- where it goes ----

    def _address(self, last: str | None = None) -> str:
        """The configured store, else the one that has this run already, else the default; sqlite made absolute."""
        if self.uri is None and last is not None:
            last = filled(last)
            database = database_file(last)
            if database is not None and database.exists():
                return last
        uri = self.uri or f"sqlite:///{Path(self.store).resolve() / 'mlflow.db'}"
        database = database_file(uri)
        return uri.rstrip("/") if database is None else f"sqlite:///{database.resolve()}"

    def _relative(self, path: Path) -> str:
        """Paths inside the run folder are kept relative to it, so that a folder that was moved can still be sent."""
        path, run_dir = Path(path).resolve(), self._spool.run_dir.resolve()
        return str(path.relative_to(run_dir)) if path.is_relative_to(run_dir) else str(path)

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            self._spool.append({**record, "time": int(time.time() * 1000)})
        except OSError as error:
            if not self._broken:
                log.warning("%s cannot be written: %s; training goes on", self._spool.path, error)
            self._broken = True
        self._asked.set()

    # ---- the background thread ----

    def _send_on(self) -> None:
        """Sends what comes until the run is closed; after a failure it tries again, ever more rarely."""
        lock = FileLock(self._spool.run_dir / "mlflow.lock", thread_local=False)
        pause = 0.0
        while not self._over and not (self._closing and not self._spool.pending()):
            if pause:
                self._hurry.wait(pause)
            else:
                self._asked.wait()
                self._hurry.wait(COLLECT if self._delivery.client else 0)
            self._hurry.clear()
            self._asked.clear()
            try:
                lock.acquire(timeout=PATIENCE)  # a `sync` of this folder may be under way
                self._delivery.send()
            except Exception as error:
                if not pause and not self._over:
                    log.warning("MLflow (%s): %s; training goes on, it is sent later", hidden(self._uri), cause(error))
                pause = min(max(RETRY[0], 2 * pause), RETRY[1])
                self._tell(failed=True)
            else:
                if pause:
                    log.warning("MLflow (%s) answers again, what it missed was sent", hidden(self._uri))
                pause = 0.0
                self._tell()
        lock.release(force=True)
        self._tell()

    def _tell(self, failed: bool = False) -> None:
        with self._news:
            self._failures += failed
            self._answers = not failed
            self._news.notify_all()

    def _alive(self, seconds: float) -> None:
        with self._news:
            self._moved = time.monotonic() + seconds

    def _wait(self, patience: float = PATIENCE) -> None:
        """Returns when all has arrived, when an attempt has failed, or when nothing has moved for so many seconds."""
        with self._news:
            failures, self._moved = self._failures, max(self._moved, time.monotonic())
            while self._spool.pending() and self._failures == failures:
                left = self._moved + patience - time.monotonic()
                if left <= 0:
                    self._answers = False
                    return
                self._news.wait(min(left, 0.5))

    # ---- the machine ----

    def _watch_system(self) -> None:
        """Logs `system/...` of this machine with MLflow's own monitors; their step is the age of the run in seconds."""
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors = []
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            try:
                monitors.append(kind())
            except Exception as error:  # no gpu, or no nvidia-ml-py
                log.debug("no %s: %s", kind.__name__, error)
        started = self._spool.first()["time"] / 1000
        while not self._closing:
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            if not self._closing:
                self._append({"kind": "metrics", "step": int(time.time() - started), "values": values})
            time.sleep(SYSTEM_EVERY)
