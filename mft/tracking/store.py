"""An MLflow store: how it is reached, and the SQLite database that is made where there is none."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from mlflow import MlflowClient


def client_for(uri: str) -> MlflowClient:
    """Returns a client that fails at once instead of repeating by itself (248 s for a dead server by default).

    MLflow reads these from the environment of the process. What a user has set stays.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing about a training leaves the machine unasked
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.db_migrations"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line for each of 50 migrations
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def database_file(uri: str) -> Path | None:
    """Returns the file of a sqlite address, else None."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def artifact_root(database: Path) -> Path:
    return database.parent / "mlartifacts"


def prepare(uri: str) -> None:
    """Creates the SQLite database of a store where it is missing (7 s), one process at a time. Others: nothing."""
    database = database_file(uri)
    if database is None:
        return
    artifact_root(database).mkdir(parents=True, exist_ok=True)
    with FileLock(artifact_root(database) / ".database.lock"):
        client_for(uri).search_experiments(max_results=1)
