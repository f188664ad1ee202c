"""What a run folder holds beside its points, in an MLflow store: files, data sets and models."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mft.console.credentials import hidden
from mft.tracking import datasets, models
from mft.tracking.params import flattened
from mft.tracking.record import Record, read_config

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SLOW_DISK = 5e6  # bytes a second that an upload is given before it counts as stuck
TEXT_FILES = {".yaml", ".yml", ".json", ".jsonl", ".txt", ".log", ".md", ".html", ".csv"}
NEWER = {"data sets": "2.4", "models": "3.0"}
"""What earlier servers do not know → the version that does."""
ANSWERS = "report/answers.json"
"""A file that MLflow's page shows as a table, {"columns": […], "data": [[…], …]}, as `log_table` writes."""


class Uploads:
    """Sends what is new or has changed since it was sent last, as `Record.uploaded` remembers it."""

    def __init__(self, client: MlflowClient, run_dir: Path, record: Record, alive: Callable[[float], None]):
        """alive: is told the seconds that the next call may take."""
        self.client, self.run_dir, self.record, self.alive = client, run_dir, record, alive

    def send(self) -> int:
        """Returns how many things were sent: files and folders, data sets, models."""
        count = self._once("config.yaml", self._files("config.yaml"), self._upload_all)
        count += self._once("data sets", self._files(datasets.REPORT), self._send_datasets)
        if not self.record.ended:
            return count
        finished = self.record.ended == "finished"
        marks = sorted(self.run_dir.glob("checkpoints/step-*/COMPLETE"))
        names = ["summary.json", "report", "report.html"]
        if self.record.checkpoints:
            names += [mark.parent.relative_to(self.run_dir).as_posix() for mark in marks]
        for name in names:
            count += self._once(name, self._files(name), self._upload_all)
        if self.record.register_as and finished:
            count += self._once("final", self._files("final"), self._register)
        # The rows of validation come before a checkpoint, those of the test last.
        written = [*marks, *self._files("final"), *self._files("metrics.jsonl"), *self._files("summary.json")]
        return count + self._once("models", written, self._send_models)

    def _files(self, name: str) -> list[Path]:
        source = self.run_dir / name
        return [file for file in (source, *sorted(source.rglob("*"))) if file.is_file()]

    def _once(self, name: str, files: list[Path], send: Callable[[Iterable[Path]], int]) -> int:
        """Sends what stands for these files, unless none of them has changed since; returns what `send`
        does."""
        changed = max((file.stat().st_mtime_ns for file in files), default=0)
        if changed in (0, self.record.uploaded.get(name)):
            return 0
        from mlflow.exceptions import MlflowException

        try:
            count = send(files)
        except MlflowException as error:
            if name not in NEWER or error.error_code != "ENDPOINT_NOT_FOUND":
                raise
            log.warning("The MLflow server is older than %s and keeps no %s of runs", NEWER[name], name)
            count = 0
        self.record.uploaded = {**self.record.uploaded, name: changed}
        self.record.save(self.run_dir)
        return count

    def _upload_all(self, files: Iterable[Path]) -> int:
        for file in files:
            self.alive(file.stat().st_size / SLOW_DISK)
            self._upload(file)
        return 1

    def _upload(self, file: Path) -> None:
        path, run_id = file.relative_to(self.run_dir), self.record.run_id
        text = file.read_text(encoding="utf-8", errors="replace") if file.suffix in TEXT_FILES else ""
        if hidden(text) != text:
            self.client.log_text(run_id, hidden(text), path.as_posix())
        else:
            self.client.log_artifact(run_id, str(file), path.parent.as_posix() if path.parent.name else None)
        if path.as_posix() == ANSWERS:
            # Not by log_table, which appends to what it finds: a resumed run writes its answers again.
            shown = json.dumps([{"path": ANSWERS, "type": "table"}])
            self.client.set_tag(run_id, "mlflow.loggedArtifacts", shown)

    def _send_datasets(self, _: Iterable[Path]) -> int:
        inputs = list(datasets.dataset_inputs(self.run_dir).values())
        self.alive(0)
        self.client.log_inputs(self.record.run_id, inputs)
        return len(inputs)

    def _send_models(self, _: Iterable[Path]) -> int:
        params, finished = flattened(read_config(self.run_dir)), self.record.ended == "finished"
        place = self.record.run_id, self.run_dir
        return models.send_models(self.client, *place, params, finished, lambda: self.alive(0))

    def _register(self, files: Iterable[Path]) -> int:
        """Uploads final/ and adds a version of the registered model that points at it."""
        from mlflow.exceptions import MlflowException

        self._upload_all(files)
        name, run_id = self.record.register_as, self.record.run_id
        with contextlib.suppress(MlflowException):  # it exists, or the next call says what is wrong
            self.client.create_registered_model(name)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/final"
        self.client.create_model_version(name, source, run_id=run_id)
        return 1
