"""Databases that MLflow cannot use, stores that vanish, and what is used of MLflow's insides."""

import logging
import sqlite3
import subprocess
import sys
from inspect import signature

import pytest

from mft import cli
from mft.errors import UserError
from mft.tracking.base import FanOut, Jsonl
from mft.tracking.mlflow import Mlflow
from mft.tracking.record import Record
from mft.tracking.sender import sync
from mft.tracking.store import client_for, system_metrics

OLD = "451aebb31d03"
"""The schema of MLflow 0.8."""

TABLES = ("experiments", "runs", "metrics")


def database(path, *tables, version=None):
    with sqlite3.connect(path) as connection:
        for table in tables:
            connection.execute(f"CREATE TABLE {table} (id INTEGER)")
        if version:
            connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
            connection.execute("INSERT INTO alembic_version VALUES (?)", [version])
    return path


@pytest.fixture
def unusable(tmp_path):
    """Name → (file, what is said of it)."""
    (tmp_path / "text.db").write_text("hello " * 1000)
    return {
        "old": (database(tmp_path / "old.db", *TABLES, version=OLD), "run: mlflow db upgrade sqlite:///"),
        "half": (database(tmp_path / "half.db", "experiments", version=OLD), "is not an MLflow database"),
        "other": (database(tmp_path / "other.db", "songs"), "is not an MLflow database. Move it away"),
        "text": (tmp_path / "text.db", "is not an MLflow database (file is not a database)"),
    }


@pytest.mark.parametrize("kind", ["old", "half", "other", "text"])
def test_an_unusable_database_is_refused_in_a_sentence_and_left_as_it_was(unusable, kind, tmp_path, capsys):
    file, sentence = unusable[kind]
    before = file.read_bytes()
    with pytest.raises(UserError) as refused:
        client_for(f"sqlite:///{file}")
    assert sentence in str(refused.value) and str(file) in str(refused.value)
    with pytest.raises(SystemExit):
        cli.main(["compare", "name", "--uri", f"sqlite:///{file}"])
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said and "Traceback" not in said and file.read_bytes() == before


def test_a_run_trains_on_with_an_old_database_and_is_sent_to_another(unusable, tmp_path, caplog):
    file, sentence = unusable["old"]
    (tmp_path / "run").mkdir()
    tracks = FanOut([Jsonl(), Mlflow(uri=f"sqlite:///{file}")])
    tracks.prepare()
    tracks.open(tmp_path / "run", {}, {})
    tracks.log(1, {"train/loss": 1.0})
    tracks.close("finished")
    first = next(record.message for record in caplog.records if "Training continues" in record.message)
    assert sentence in first and len(first) < 500 and "\n" not in first
    with pytest.raises(UserError, match="mlflow db upgrade"):
        sync(tmp_path / "run")
    assert sync(tmp_path / "run", f"sqlite:///{tmp_path}/new.db") == (1, False)


def test_a_database_deleted_in_mid_run_is_a_sentence_and_loses_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", DELETED, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert "was deleted or moved. Training continues" in run.stderr and "mft tracking sync" in run.stderr
    assert len(run.stderr.splitlines()) == 2, run.stderr
    assert sync(tmp_path / "run")[0] == 5
    record = Record.read(tmp_path / "run")
    history = client_for(record.uri).get_metric_history(record.run_id, "train/loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 4, 5]


DELETED = """
import json, sys, time
from pathlib import Path
from mft.tracking.base import FanOut, Jsonl
from mft.tracking.mlflow import Mlflow
work = Path(sys.argv[1])
tracks = FanOut([Jsonl(), Mlflow(store=str(work))])
tracks.open(work / "run", {}, {})
tracks.log(1, {"train/loss": 1.0})
until = time.monotonic() + 120
while not json.loads((work / "run" / "mlflow.json").read_text())["places"]:
    assert time.monotonic() < until, "nothing was sent"
    time.sleep(0.1)
(work / "mlflow.db").unlink()
for step in range(2, 6):
    tracks.log(step, {"train/loss": 1.0})
    time.sleep(0.3)
tracks.close("finished")
"""


def test_which_address_wins(tmp_path, monkeypatch):
    def address(last="", **fields):
        return Mlflow(store=str(tmp_path), **fields).address(last)

    default = f"sqlite:///{tmp_path}/mlflow.db"
    here = f"sqlite:///{database(tmp_path / 'last.db')}"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert address() == address(f"sqlite:///{tmp_path}/gone.db") == default
    assert address(here) == here and address("http://team:5000") == "http://team:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000/")
    assert address() == address(here) == "http://env:5000"
    assert address(here, uri="http://given:5000") == "http://given:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=\./mlruns: not an address"):
        Mlflow()
    assert Mlflow(uri="http://given:5000").uri == "http://given:5000"


def test_a_run_goes_to_the_store_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/team.db")
    (tmp_path / "run").mkdir()
    tracks = Mlflow(store=str(tmp_path))
    tracks.open(tmp_path / "run", {}, {})
    tracks.close("finished")
    assert f"--backend-store-uri sqlite:///{tmp_path}/team.db" in tracks.where()
    assert Record.read(tmp_path / "run").uri == f"sqlite:///{tmp_path}/team.db"
    assert (tmp_path / "team.db").exists() and not (tmp_path / "mlflow.db").exists()


def test_what_is_used_of_the_insides_of_mlflow_is_there():
    """Fails when an upgrade of MLflow removes a private part that tracking.store uses."""
    from mlflow.store.db.utils import _get_latest_schema_revision
    from mlflow.store.entities import PagedList
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.utils import get_results_from_paginated_fn

    schema = _get_latest_schema_revision()
    assert schema.isalnum() and len(schema) == 12
    assert get_results_from_paginated_fn(lambda count, token: PagedList("ab", None), 2) == ["a", "b"]
    # A server has no such call; a database that has lost it would be asked run by run.
    assert callable(SqlAlchemyStore.get_metric_history_bulk)
    assert list(signature(SqlAlchemyStore.get_metric_history_bulk).parameters)[1:] == [
        *("run_ids", "metric_key", "max_results"),
    ]
    assert hasattr(client_for("http://unused")._tracking_client, "store")
    values = next(system_metrics())
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= set(values)
    import mlflow.store.db.utils

    assert isinstance(mlflow.store.db.utils._logger, logging.Logger)
    assert mlflow.store.db.utils._logger.name == "mlflow.store.db.utils"
