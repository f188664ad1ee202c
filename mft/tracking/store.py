"""How an MLflow store is reached, and all that is used of MLflow's insides (read in 3.17.2).

A SQLite database is made where there is none, by one process at a time; one that this MLflow cannot use is refused
in a sentence before MLflow touches it, since MLflow migrates any file half-way and then fails with a traceback.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from filelock import FileLock

from mft.console.credentials import hidden
from mft.errors import UserError
from mft.tracking.params import cut

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


def client_for(uri: str) -> MlflowClient:
    """Returns a client that fails at once instead of retrying by itself (248 s for a dead server by default).

    MLflow reads these from the environment of the process. What a user has set stays. Raises UserError for a SQLite
    file that this MLflow cannot use.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing about a training leaves the machine unasked
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db_migrations"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line for each of 50 migrations
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # 90 lines for each error that it raises too
    if (database := database_file(uri)) is not None:
        _check_database(database, uri)
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
    with FileLock(artifact_root(database) / ".database.lock"):  # MLflow's own migrations race
        client_for(uri).search_experiments(max_results=1)


def reason(error: Exception, uri: str) -> str:
    """Returns in a line, without credentials, why a store does not take a run."""
    database = database_file(uri)
    if isinstance(error, UserError):
        return hidden(str(error))
    if database is not None and not database.exists():
        return f"{database} was deleted or moved"
    text = hidden(str(error)).strip()
    if "out-of-date database schema" in text:  # of a database other than SQLite
        return f"its database is of another MLflow version. Back it up, then run: mlflow db upgrade {hidden(uri)}"
    return f"{type(error).__name__}: {cut(text.splitlines()[0] if text else '', 200)}"


def _check_database(path: Path, uri: str) -> None:
    """Raises UserError for a file that is no database, another program's, or of another MLflow version."""
    if not path.exists():
        return
    other = "Move it away, or choose another store with tracking.mlflow.uri."
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                return  # new: MLflow fills it
            if not tables >= {"experiments", "runs", "metrics", "alembic_version"}:
                raise UserError(f"{path} is not an MLflow database. {other}")
            row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError:  # locked by a writer, or not readable: MLflow waits longer and says more
        return
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is not an MLflow database ({error}). {other}") from error
    found, needed = row[0] if row else "none", _schema()
    if found != needed:
        raise UserError(
            f"{path} is of another MLflow version (schema {found}, installed is {needed}). "
            f"Back it up, then run: mlflow db upgrade {uri} (or install the newer MLflow that wrote it)."
        )


def _schema() -> str:
    """Returns the revision of the database schema that the installed MLflow works with."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())


def system_monitors() -> list[Any]:
    """Returns MLflow's own monitors of cpu, memory, disk, network and gpu, those that this machine has."""
    monitors = []
    for name in ("CPUMonitor", "DiskMonitor", "NetworkMonitor", "GPUMonitor"):
        module = import_module(f"mlflow.system_metrics.metrics.{name.removesuffix('Monitor').lower()}_monitor")
        try:
            monitors.append(getattr(module, name)())
        except Exception as error:  # no gpu, or no nvidia-ml-py
            log.debug("no %s: %s", name, error)
    return monitors


def read_monitors(monitors: list[Any]) -> dict[str, float]:
    """Returns what the monitors measure now, as system/…"""
    values: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return values
