"""How an MLflow store is reached, and the private parts of MLflow that this takes (as of 3.17.2).

A test of the store guards them all.

A SQLite database is created where there is none, by one process at a time. One that this MLflow cannot use is
refused in a sentence before MLflow touches it, which would migrate any file half-way and end in a traceback.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from filelock import FileLock

from mft.console.credentials import hidden
from mft.errors import UserError, nearest
from mft.tracking.params import cut

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.store.entities import PagedList

log = logging.getLogger(__name__)

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
"""How the address of a store begins; a driver may follow with a plus, postgresql+psycopg."""

PAGE = 200
"""Runs asked of a store at once: a busy server takes more than its 10 s for a thousand."""

AT_ONCE = 100
"""Runs whose points are asked of a database at once: all are in memory then."""

THREADS = 8
"""Questions that a server is asked side by side."""

REFUSED = {
    "UNAUTHENTICATED": "it does not accept the user and password given (MLFLOW_TRACKING_USERNAME, "
    "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN)",
    "PERMISSION_DENIED": "this user may not write to the experiment",
}
"""What the errors of a server with authentication mean."""


def client_for(uri: str) -> MlflowClient:
    """Returns a client that fails at once instead of retrying by itself (248 s for a dead server by default).

    MLflow reads these settings from the environment of the process; what a user has set stays. Raises
    UserError for a SQLite file that this MLflow cannot use.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves the machine unasked
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db_migrations"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line for each of 50 migrations
    # 90 lines of traceback for each error, which it raises as well
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if (database := database_file(uri)) is not None:
        _check_database(database, uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_address(uri: str, key: str) -> None:
    """Raises UserError for what is not the address of a store; key: where it was given."""
    if uri == "databricks":
        return
    setting = f"{key}={hidden(uri)}"
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else ""
    if scheme not in SCHEMES:
        # localhost:5000, as a server prints itself
        meant = f"http://{uri}" if re.fullmatch(r"[\w.-]+:\d+", uri) else ""
        hint = f"; did you mean {meant}?" if meant else nearest(scheme, SCHEMES) if scheme else ""
        raise UserError(
            f"{setting}: not an address that mft can send to{hint or '.'} Allowed: http(s)://host:port, "
            f"sqlite:///path/mlflow.db and other databases ({', '.join(SCHEMES)})."
        )
    if scheme == "sqlite" and not uri.startswith("sqlite:///"):
        raise UserError(f"{setting}: needs three slashes: sqlite:///path/mlflow.db.")
    if scheme.startswith("http") and not urlsplit(uri).hostname:
        raise UserError(f"{setting}: the host is missing; expected http(s)://host:port.")
    database = database_file(uri)
    parents = database.absolute().parents if database else ()
    if (there := next((path for path in parents if path.exists()), None)) and not there.is_dir():
        raise UserError(f"{setting}: {there} is not a folder.")


def database_file(uri: str) -> Path | None:
    """Returns the file of a sqlite address, else None."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def artifact_root(database: Path) -> Path:
    return database.parent / "mlartifacts"


def prepare(uri: str) -> MlflowClient:
    """Returns a client, with the SQLite database created where it is missing (7 s), one process at a time."""
    database = database_file(uri)
    if database is None:
        return client_for(uri)
    artifact_root(database).mkdir(parents=True, exist_ok=True)
    with FileLock(artifact_root(database) / ".database.lock"):  # MLflow's own migrations race
        client = client_for(uri)
        client.search_experiments(max_results=1)
    return client


def reason(error: Exception, uri: str, host: str = "") -> str:
    """Returns in a line, without credentials, why a store does not take a run.

    host: a name that is not to be told.
    """
    database = database_file(uri)
    if isinstance(error, UserError):
        return _without(host, hidden(str(error)))
    if database is not None and not database.exists():
        return f"{database} was deleted or moved"
    if (refused := REFUSED.get(getattr(error, "error_code", ""))) is not None:
        return refused
    text = _without(host, hidden(str(error)).strip())  # before it is cut, which leaves halves of names
    if "out-of-date database schema" in text:  # of a database other than SQLite
        command = f"mlflow db upgrade {_without(host, hidden(uri))}"
        return f"its database is of another MLflow version. Back it up, then run: {command}"
    return f"{type(error).__name__}: {cut(text.splitlines()[0] if text else '', 200)}"


def _without(host: str, text: str) -> str:
    return text.replace(host, "…") if host else text


def _check_database(path: Path, uri: str) -> None:
    """Raises UserError for a file that is not a database, not MLflow's, or of another MLflow version."""
    if not path.exists():
        return
    other = "Move it away, or choose another store with tracking.mlflow.uri."
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
            names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in names}
            if not tables:
                return  # new: MLflow fills it
            if not tables >= {"experiments", "runs", "metrics", "alembic_version"}:
                raise UserError(f"{path} is not an MLflow database. {other}")
            row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError:  # locked or unreadable: MLflow waits longer and says more
        return
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is not an MLflow database ({error}). {other}") from error
    from mlflow.store.db.utils import _get_latest_schema_revision

    schema, needed = row[0] if row else "none", _get_latest_schema_revision()
    if schema != needed:
        raise UserError(
            f"{path} is of another MLflow version (schema {schema}, installed is {needed}). "
            f"Back it up, then run: mlflow db upgrade {uri} (or install the newer MLflow that wrote it)."
        )


def runs_of(client: MlflowClient, experiment: str) -> list[Run]:
    """Returns all runs of an experiment, by its id, that were not deleted."""
    from mlflow.utils import get_results_from_paginated_fn

    def page(count: int, token: str | None) -> PagedList[Run]:
        return client.search_runs([experiment], max_results=count, page_token=token)

    return list(get_results_from_paginated_fn(page, PAGE))


def histories(
    client: MlflowClient, runs_of_metric: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str, int, float]]:
    """Yields every point as (id of the run, metric, step, value), each run's in the order they were logged.

    runs_of_metric: {metric: ids of the runs that have it}. A database is asked once for many runs (1,200
    runs: 10 s instead of 38); a server has no such call, and is asked by several threads.
    """
    at_once = getattr(client._tracking_client.store, "get_metric_history_bulk", None)
    if at_once is not None:
        for metric, ids in runs_of_metric.items():
            for start in range(0, len(ids), AT_ONCE):
                for found in at_once(ids[start : start + AT_ONCE], metric, None):
                    yield found.run_id, metric, found.step, found.value
        return
    wanted = [(run_id, metric) for metric, ids in runs_of_metric.items() for run_id in ids]
    with ThreadPoolExecutor(THREADS) as pool:
        answers = pool.map(lambda pair: client.get_metric_history(*pair), wanted)
        for (run_id, metric), points in zip(wanted, answers, strict=True):
            for point in points:
                yield run_id, metric, point.step, point.value


def system_metrics() -> Iterator[dict[str, float]]:
    """Yields, at each step, what MLflow's own monitors of this machine measure, as system/…"""
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # a line where there is no GPU
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # It is never started and sends nothing. The address keeps its client from opening a database, which the
    # sender's thread may be creating.
    machine = SystemMetricsMonitor("", tracking_uri="http://unused")
    while True:
        machine.collect_metrics()
        yield {f"system/{name}": value for name, value in machine.aggregate_metrics().items()}
        for monitor in machine.monitors:
            monitor.clear_metrics()
