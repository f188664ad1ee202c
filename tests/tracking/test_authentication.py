"""A real server with users and passwords."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from mft.errors import UserError
from mft.tracking.base import FanOut, Jsonl
from mft.tracking.mlflow import Mlflow
from mft.tracking.record import Record
from mft.tracking.sender import sync
from mft.tracking.store import client_for
from tests.tracking.folders import sent, write_run
from tests.tracking.server import free_port, kill_server, start_server

pytestmark = pytest.mark.slow

RIGHT, WRONG = "correct-horse-battery", "wrong-horse-battery"


@pytest.fixture(scope="module")
def server(store, tmp_path_factory):
    """The address of a server, and the folder of its store."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(store / "empty.db", folder / "mlflow.db")
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"database_uri = sqlite:///{folder}/users.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 300\n"  # else every call takes the time of hashing the password
    )
    settings = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_AUTH_ADMIN_PASSWORD": RIGHT}
    settings["MLFLOW_FLASK_SERVER_SECRET_KEY"] = "of this test"
    process = start_server(folder, port, ["--app-name", "basic-auth"], **settings)
    yield f"http://127.0.0.1:{port}", folder
    kill_server(process)


def log_in(monkeypatch, password):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def train(run_dir, uri):
    """Logs a run as a training does; returns nothing, and must not raise."""
    write_run(run_dir, "")
    for name in ("mlflow.json", "metrics.jsonl"):
        (run_dir / name).unlink()
    tracks = FanOut([Jsonl(), Mlflow(uri=uri, experiment="small")])
    tracks.open(run_dir, {}, {"name": "coba"})
    for step in (2, 4, 6):
        tracks.log(step, {"valid/loss": 1 / step, "valid/loss/docs": 1 / step})
    tracks.close("finished")


def written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_wrong_password_is_a_sentence_and_loses_nothing(server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    uri, store = server
    run_dir = tmp_path / "run"
    log_in(monkeypatch, WRONG)
    train(run_dir, uri)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("mft")]
    assert len(said) == 2 and "mft tracking sync" in said[1], said
    assert "does not accept the user and password given (MLFLOW_TRACKING_USERNAME, " in said[0]
    assert "Training continues" in said[0] and len(said[0]) < 300
    with pytest.raises(UserError, match="does not accept the user and password") as refused:
        sent(run_dir)
    log_in(monkeypatch, RIGHT)
    assert sent(run_dir) > 0 and sync(run_dir) == (0, False)
    record, client = Record.read(run_dir), client_for(uri)
    run = client.get_run(record.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "coba"
    assert [p.step for p in client.get_metric_history(record.run_id, "valid/loss")] == [2, 4, 6]
    assert len(client.search_logged_models([run.info.experiment_id])) == 4
    said_at_all = (caplog.text + str(refused.value)).encode()
    for password in (RIGHT, WRONG):
        assert password.encode() not in written(run_dir) + written(store) + said_at_all


@pytest.mark.long  # the test above logs in with it in the end
def test_the_right_password_is_used_and_kept_nowhere(server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    uri, store = server
    log_in(monkeypatch, RIGHT)
    train(tmp_path / "run", uri)
    sent(tmp_path / "run")
    assert "does not accept" not in caplog.text and Record.read(tmp_path / "run").ended == "finished"
    assert RIGHT.encode() not in written(tmp_path) + written(store) + caplog.text.encode()


def test_a_user_without_permission_is_told_so(server, tmp_path, monkeypatch):
    from mlflow.server import get_app_client

    uri, _ = server
    log_in(monkeypatch, RIGHT)
    client_for(uri).create_experiment("of the admin")
    get_app_client("basic-auth", tracking_uri=uri).create_user("reader", RIGHT)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    run_dir = write_run(tmp_path / "run", uri, experiment="of the admin")
    with pytest.raises(UserError, match="this user may not write to the experiment"):
        sync(run_dir)
