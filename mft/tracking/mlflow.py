"""Tracking with MLflow: training neither waits for the store nor fails with it, and no metric is lost."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mft.console.credentials import filled, hidden, without_credentials
from mft.errors import UserError, shortened
from mft.tracking.base import Tracker
from mft.tracking.params import cut
from mft.tracking.record import Record
from mft.tracking.sender import Sender
from mft.tracking.store import check_address, database_file, prepare, reason, system_metrics
from mft.tracking.view import CHARTS, TABLE

log = logging.getLogger(__name__)

PATIENCE = 4.0  # seconds without any progress after which open and close stop waiting
COLLECT = 0.5  # seconds in which points gather before they are sent in one call
RETRY = (1.0, 60.0)  # seconds until a store that did not answer is tried again: doubled each time, at most
SYSTEM_EVERY = 10.0  # seconds between two looks at cpu, memory, disk, network and gpu


@dataclass
class Mlflow(Tracker):
    """Records a run in an MLflow store: a local SQLite database (the default) or a server.

    A background thread sends what the run writes into its folder. A store that is down costs PATIENCE seconds
    at the start and at the end; what it missed is sent when it answers again, by this process, the resumed
    run, or `sync`. A run opened again in the same folder continues as the same MLflow run.
    """

    public_name: ClassVar[str] = "mlflow"

    uri: str | None = None
    """Address of the store. None = MLFLOW_TRACKING_URI if set, else the SQLite database in `store`."""

    store: str = "."
    """Folder of the default store, relative to where mft is started; unused with an address."""

    experiment: str = "default"
    """Name of the experiment; change it to compare runs on a separate page."""

    run_name: str | None = None
    """Name in the table. None = the short name of the run, which its tag `name` holds."""

    system_metrics: bool = False
    """Whether to log cpu, memory, disk, network and gpu of rank 0's machine every 10 s as system/…"""

    register_as: str | None = None
    """Registered model that the final model becomes a version of. None = it stays in the run folder."""

    checkpoints: bool = False
    """Whether to upload the checkpoints that the run kept when it ends: three times the trained size each."""

    def __post_init__(self) -> None:
        key = "MLFLOW_TRACKING_URI" if self.uri is None else "tracking.mlflow.uri"
        uri = os.environ.get(key, "") if self.uri is None else self.uri
        if uri or self.uri is not None:
            check_address(uri, key)
        if not self.experiment.strip():
            raise UserError("tracking.mlflow.experiment is empty; MLflow groups runs by the name of one.")
        if self.register_as is not None and (
            not self.register_as.strip() or set(self.register_as) & set("/:")
        ):
            setting = f"tracking.mlflow.register_as={shortened(self.register_as)}"
            raise UserError(f"{setting} must be a name without / and :, or null.")

    def prepare(self) -> None:
        uri = self.address()
        if database_file(uri) is None:
            return
        try:
            prepare(uri)
        except Exception as error:
            log.warning("MLflow's database could not be prepared: %s", reason(error, uri))

    def open(self, run_dir: Path, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Starts the sender. The config is sent as it stands in the folder's config.yaml."""
        record = Record.read(run_dir)
        now, resumed = int(time.time() * 1000), bool(record.uri)
        tags = {name: hidden(str(value)) for name, value in tags.items()}
        if "git_commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git_commit"]  # the page's column Version
        record.tags = tags | ({"resumed_from_step": str(step)} if resumed else {})
        record.experiment = self.experiment
        record.run_name = cut(
            self.run_name or tags.get("name") or tags.get("job") or run_dir.resolve().name, 200
        )
        record.register_as, record.checkpoints = self.register_as or "", self.checkpoints
        record.started = record.started or now
        record.outcome = record.ended = ""
        # A resume has cut metrics.jsonl back: it is read from the start, and the store says what it has.
        record.places = {name: [0, 0, now] for name in record.places}
        self._sender = Sender(run_dir, record, self.address(record.uri))
        record.save(run_dir)  # `sync` has to know the store, also one that is never reached
        self._news, self._closing = threading.Event(), threading.Event()
        self._attempts, self._failed, self._delivered = 0, False, False
        self._thread = threading.Thread(target=self._send_on, name="mlflow", daemon=True)
        self._thread.start()
        self._news.set()
        # So that a wrong address is reported before the first step.
        self._wait(lambda: self._attempts > 0, PATIENCE)
        if self.system_metrics:
            threading.Thread(target=self._watch_system, name="mlflow-system", daemon=True).start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Wakes the sender, which reads metrics.jsonl; infinity is null there, so a tag tells the last."""
        at = f"last at step {step}"
        infinite = {f"infinite.{k}": f"{float(v)}, {at}" for k, v in values.items() if math.isinf(v)}
        if infinite:
            self._sender.record.tags = self._sender.record.tags | infinite
            self._sender.record.save(self._sender.run_dir)
        self._news.set()

    def report(self, sweep_dir: Path, file: Path, tags: Mapping[str, str]) -> None:
        """Keeps it in an experiment of reports: among the runs it would be in the legend of every chart."""
        name = f"report of sweep {tags['sweep']}"
        named = replace(self, experiment=f"{self.experiment} reports", run_name=name, system_metrics=False)
        named.open(sweep_dir, {}, tags)
        named.close("finished")

    def close(self, status: str) -> None:
        """Sends the rest, with the files, checkpoints and final model that are in the run folder by now."""
        try:
            self._sender.record.outcome = status
            self._sender.record.save(self._sender.run_dir)
        finally:  # also on a full disk; a store that failed a moment ago gets less time
            self._closing.set()
            self._news.set()
            self._wait(lambda: not self._thread.is_alive(), PATIENCE / 4 if self._failed else PATIENCE)
        if not self._delivered:
            later = f"nothing is lost, `mft tracking sync {self._sender.run_dir}` sends it"
            log.warning("%s has not received all of this run; %s", self._store(), later)

    def where(self) -> str:
        sender: Sender | None = getattr(self, "_sender", None)
        uri, experiment = (sender.uri, sender.experiment_id) if sender else (self.address(), "")
        local = database_file(uri) is not None
        command = (
            f"mlflow ui --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1 --port 5000" if local else ""
        )
        if not experiment or not (local or uri.startswith("http")):
            return command or without_credentials(uri)
        server = "http://127.0.0.1:5000" if local else without_credentials(uri)
        page = f"{server}/#/experiments/{experiment}/runs?"
        pages = f"{page}{CHARTS}\nor, as a table, the best run first: {page}{TABLE}"
        return f"{command}\nthen open {pages}" if local else pages

    def address(self, last: str = "") -> str:
        """Returns the configured store, MLFLOW_TRACKING_URI, `last` (which has this run) or the default."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        database = database_file(last)
        if not uri and (database.exists() if database is not None else last):
            with suppress(KeyError):  # a variable that was set when the run began
                uri = filled(last)
        uri = uri or f"sqlite:///{Path(self.store).resolve() / 'mlflow.db'}"
        database = database_file(uri)
        return uri.rstrip("/") if database is None else f"sqlite:///{database.resolve()}"

    def _store(self) -> str:
        return f"MLflow ({hidden(self._sender.uri)})"

    def _wait(self, done: Callable[[], bool], patience: float) -> None:
        """Returns when it is done, or when nothing has moved for so many seconds."""
        start = time.monotonic()
        while not done() and time.monotonic() < max(start, self._sender.moved) + patience:
            time.sleep(0.02)

    # ---- background threads ----

    def _send_on(self) -> None:
        """Sends what comes until the run is closed; after a failure it tries again, ever more rarely."""
        pause = 0.0
        while not self._delivered:
            if not pause:
                self._news.wait()
            self._closing.wait(pause or (COLLECT if self._sender.attached else 0))
            self._news.clear()
            closing = self._closing.is_set()
            try:
                self._sender.send(self._sender.record.outcome if closing else "")
            except Exception as error:
                if not pause:
                    why = reason(error, self._sender.uri)
                    log.warning("%s: %s. Training continues; the run is sent later", self._store(), why)
                pause, self._failed = min(max(RETRY[0], 2 * pause), RETRY[1]), True
            else:
                if pause:
                    log.warning("%s is reachable again; what it missed was sent", self._store())
                pause, self._failed, self._delivered = 0.0, False, closing
            self._attempts += 1
            if closing:
                break
        self._sender.lock.release(force=True)

    def _watch_system(self) -> None:
        """Writes system.jsonl, which is sent like metrics.jsonl; its steps are seconds since the start."""
        sender = self._sender
        for values in system_metrics():
            # Through a file: what a store that is down misses has to survive this process.
            row = {"step": int(time.time() - sender.record.started / 1000)} | values
            with suppress(OSError), (sender.run_dir / "system.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._news.set()
            if self._closing.wait(SYSTEM_EVERY):
                break
