"""MLflow with real stores: a SQLite file, and a server that is killed and comes back."""

import json
import logging
import math
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mft import cli
from mft.config.identity import Identity
from mft.errors import UserError
from mft.files.json_file import write_json
from mft.tracking.delivery import sync
from mft.tracking.mlflow import PATIENCE, Mlflow
from mft.tracking.store import client_for
from tests.tracking.server import free_port, kill_server, start_server

FEW_SECONDS = 3 * PATIENCE
"""What a store that is down may cost: the code waits PATIENCE at most, the rest is for a machine that is busy."""

CONFIG = {"optimizer": {"lr": 1e-5}, "task": {"docs": {"weight": 2.0}}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder with a database, made once; experiments keep the tests apart."""
    folder = tmp_path_factory.mktemp("store")
    Mlflow(store=str(folder)).prepare()
    return folder


@pytest.fixture
def tracker(store, request):
    return lambda **fields: Mlflow(**{"store": str(store), "experiment": request.node.name} | fields)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def close(tracks, run_dir, status="finished"):
    """Closes and waits until all has arrived: `close` leaves to sync what takes a busy disk longer than PATIENCE."""
    tracks.close(status)
    deadline = time.monotonic() + 120
    while True:
        try:
            return sync(run_dir)
        except UserError:  # the sender is still at it
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def recorded(run_dir, uri=None):
    """The run of a folder as its store has it: run, client."""
    state = json.loads((run_dir / "mlflow.json").read_text())
    client = client_for(uri or state["uri"])
    return client.get_run(state["run_id"]), client


def history(run_dir, name, uri=None):
    run, client = recorded(run_dir, uri)
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


def artifacts(run_dir, folder=None):
    run, client = recorded(run_dir)
    return {file.path for file in client.list_artifacts(run.info.run_id, folder)}


def test_a_run_is_there_with_all_it_was_given(tracker, run_dir, store):
    (run_dir / "config.yaml").write_text("optimizer:\n  lr: 1e-05\n")
    (run_dir / "report").mkdir()
    (run_dir / "report" / "losses.png").write_bytes(b"png")
    tracks = tracker()
    tracks.open(run_dir, CONFIG, {"git_commit": "abc", "job": "loss=coba", "overrides": "[loss=coba]"})
    for step in (1, 2, 3):
        tracks.log(step, {"train/loss": 1 / step, "valid/loss/docs": 2.0})
    tracks.artifact(run_dir / "report")
    close(tracks, run_dir)
    run, _ = recorded(run_dir)
    assert run.info.status == "FINISHED" and run.info.run_name == "loss=coba"
    assert run.data.params == {"optimizer.lr": "1e-05", "task.docs.weight": "2.0"}
    assert run.data.tags["git_commit"] == run.data.tags["mlflow.source.git.commit"] == "abc"
    assert history(run_dir, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert artifacts(run_dir) == {"config.yaml", "report"} and artifacts(run_dir, "report") == {"report/losses.png"}
    assert run.info.artifact_uri.startswith((store / "mlartifacts").as_uri())
    command, page = tracks.where().split("  then open ")
    assert command == f"mlflow ui --backend-store-uri sqlite:///{store}/mlflow.db --host 127.0.0.1 --port 5000"
    assert page.startswith(f"http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}/runs?")


@pytest.mark.parametrize(("status", "shown"), [("failed", "FAILED"), ("stopped", "KILLED")])
def test_how_it_ended(tracker, run_dir, status, shown):
    tracks = tracker()
    tracks.open(run_dir, {}, {})
    close(tracks, run_dir, status)
    assert recorded(run_dir)[0].info.status == shown


def test_many_and_long_and_refused(tracker, run_dir):
    config = {f"group{i}": {f"key@{j}": "v" * 20_000 if i == j == 0 else j for j in range(50)} for i in range(50)}
    config |= {"k" * 400: 1}
    tracks = tracker()
    tracks.open(run_dir, config, {"long": "t" * 20_000, "a[b]": "x"})
    tracks.log(1, {"valid/pass@1": 0.5, "a[1]=b": 1.0, "../up": 2.0, "nan": math.nan, "inf": math.inf})
    close(tracks, run_dir)
    run, _ = recorded(run_dir)
    assert len(run.data.params) == 2501 and run.data.params["group3.key_at_7"] == "7"
    assert run.data.metrics["valid/pass_at_1"] == 0.5 and len(run.data.metrics) == 5
    assert math.isnan(history(run_dir, "inf")[0][1]) and run.data.tags["infinite.inf"] == "inf, last at step 1"


def test_a_resumed_run_goes_on_without_doubled_points(tracker, run_dir):
    first = tracker()
    first.open(run_dir, CONFIG, {})
    for step in (1, 2, 3, 4):
        first.log(step, {"train/loss": float(step)})
    close(first, run_dir, "failed")
    before = recorded(run_dir)[0].info.run_id
    with (run_dir / "mlflow.spool.jsonl").open("a") as file:
        file.write('{"kind": "metr')  # a line the killed process did not finish
    again = tracker()
    again.open(run_dir, {"optimizer": {"lr": 2e-5}, "new": 1}, {}, step=2)
    for step in (3, 4, 5):
        again.log(step, {"train/loss": float(step), "valid/loss/docs": 1.0})
    close(again, run_dir)
    run, client = recorded(run_dir)
    assert run.info.run_id == before and run.info.status == "FINISHED"
    assert history(run_dir, "train/loss") == [(step, float(step)) for step in (1, 2, 3, 4, 5)]
    assert history(run_dir, "valid/loss/docs") == [(3, 1.0), (4, 1.0), (5, 1.0)]
    assert run.data.params["optimizer.lr"] == "1e-05" and run.data.params["new"] == "1"
    assert run.data.tags["changed.optimizer.lr"] == "1e-05 -> 2e-05" and run.data.tags["resumed_from_step"] == "2"
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_what_was_sent_without_being_noted_is_not_doubled(tracker, run_dir):
    tracks = tracker()
    tracks.open(run_dir, CONFIG, {})
    tracks.log(1, {"train/loss": 1.0})
    close(tracks, run_dir)
    before = recorded(run_dir)[0].info.run_id
    uri = json.loads((run_dir / "mlflow.json").read_text())["uri"]
    (run_dir / "mlflow.json").unlink()  # as if killed between sending and noting it
    assert sync(run_dir, uri) == 3
    assert recorded(run_dir)[0].info.run_id == before and history(run_dir, "train/loss") == [(1, 1.0)]
    assert sync(run_dir) == 0


def test_the_whole_run_can_be_sent_to_another_store(tracker, run_dir, tmp_path):
    tracks = tracker()
    tracks.open(run_dir, CONFIG, {})
    tracks.log(1, {"train/loss": 1.0})
    close(tracks, run_dir)
    other = f"sqlite:///{tmp_path}/other.db"
    assert sync(run_dir, other) == 3
    assert history(run_dir, "train/loss", other) == [(1, 1.0)]


def test_a_model_is_kept_only_where_it_is_to_be_registered(tracker, run_dir):
    (run_dir / "final").mkdir()
    (run_dir / "final" / "config.json").write_text("{}")
    for name in (None, "code-model"):
        tracks = tracker(register_as=name)
        tracks.open(run_dir, {}, {})
        tracks.model(run_dir / "final")
        close(tracks, run_dir)
        assert artifacts(run_dir) == (set() if name is None else {"final"})
    run, client = recorded(run_dir)
    (version,) = client.search_model_versions("name = 'code-model'")
    assert version.run_id == run.info.run_id and version.source.endswith("/final")


def test_checkpoints_are_kept_on_request(tracker, run_dir):
    (run_dir / "checkpoints" / "step-2").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-2" / "COMPLETE").write_text("")
    for wanted in (False, True):
        tracks = tracker(checkpoints=wanted)
        tracks.open(run_dir, {}, {})
        tracks.checkpoint(run_dir / "checkpoints" / "step-2")
        close(tracks, run_dir)
        assert artifacts(run_dir) == ({"checkpoints"} if wanted else set())
    assert artifacts(run_dir, "checkpoints/step-2") == {"checkpoints/step-2/COMPLETE"}


def test_the_report_of_a_sweep_is_a_run_without_points_and_is_renewed(tracker, run_dir):
    for text in ("first", "second"):  # the sweep goes on, and its report is written again
        (run_dir / "report.html").write_text(text)
        tracker().report(run_dir, run_dir / "report.html", {"sweep": "abc", "name": "small"})
        sync(run_dir)
    run, client = recorded(run_dir)
    assert run.info.run_name == "report of sweep abc" and run.data.tags["sweep"] == "abc"
    assert not run.data.metrics and not run.data.params
    assert Path(client.download_artifacts(run.info.run_id, "report.html")).read_text() == "second"
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_system_metrics_on_request(tracker, run_dir):
    tracks = tracker(system_metrics=True)
    tracks.open(run_dir, {}, {})
    deadline = time.monotonic() + 120
    while '"system/' not in (run_dir / "mlflow.spool.jsonl").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    close(tracks, run_dir)
    assert "system/cpu_utilization_percentage" in recorded(run_dir)[0].data.metrics


def test_credentials_reach_nothing(tracker, run_dir, caplog):
    caplog.set_level(logging.DEBUG, "mft")
    uri = "http://me:hunter2@127.0.0.1:9"  # nobody listens on port 9
    config = {"tracking": {"mlflow": {"uri": uri}}}
    (run_dir / "config.yaml").write_text(f"uri: {uri}\n")
    tracks = tracker(uri=uri)
    tracks.open(run_dir, config, {"overrides": f"[tracking.mlflow.uri={uri}]"})
    tracks.close("finished")
    with pytest.raises(UserError) as told:
        sync(run_dir, uri)
    written = "".join(path.read_text() for path in run_dir.iterdir() if path.name != "config.yaml")
    assert "hunter2" not in caplog.text + str(told.value) + tracks.where() + written
    good = tracker().where().split()[3]
    assert sync(run_dir, good) == 4
    run, client = recorded(run_dir)
    assert "hunter2" not in json.dumps(run.to_dictionary())
    assert "hunter2" not in Path(client.download_artifacts(run.info.run_id, "config.yaml")).read_text()


def test_a_server_that_is_down_costs_little_and_is_told_once(tracker, run_dir, caplog):
    start = time.monotonic()
    tracks = tracker(uri="http://127.0.0.1:9")
    tracks.open(run_dir, CONFIG, {})
    assert time.monotonic() - start < FEW_SECONDS
    start = time.monotonic()
    for step in range(1000):
        tracks.log(step, {"train/loss": 1.0})
    assert time.monotonic() - start < 2
    start = time.monotonic()
    tracks.close("finished")
    assert time.monotonic() - start < FEW_SECONDS
    assert [record.message.count("training goes on") for record in caplog.records].count(1) == 1
    assert "mft tracking sync" in caplog.text
    assert sync(run_dir, tracker().where().split()[3]) == 1002
    assert len(history(run_dir, "train/loss")) == 1000


def test_a_server_that_never_answers_costs_little(tracker, run_dir):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        tracks = tracker(uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracks.open(run_dir, CONFIG, {})
        tracks.close("finished")
        assert time.monotonic() - start < 2 * FEW_SECONDS


def test_nothing_to_send():
    with pytest.raises(UserError, match=r"mlflow\.spool\.jsonl"):
        sync(Path("nowhere"))


KILLED = """
import os, sys, time
from pathlib import Path
from mft.tracking.mlflow import PATIENCE, Mlflow
tracker = Mlflow(store=sys.argv[1], experiment="killed")
tracker.open(Path(sys.argv[2]), {}, {})
for step in range(1, 51):
    tracker.log(step, {"train/loss": float(step)})
    time.sleep(0.02)
while not (Path(sys.argv[2]) / "mlflow.json").exists():
    time.sleep(0.02)
os._exit(9)
"""


def test_a_run_killed_by_force_is_marked_and_taken_up_again(store, run_dir, capsys):
    subprocess.run([sys.executable, "-c", KILLED, str(store), str(run_dir)], check=False)
    assert recorded(run_dir)[0].info.status == "RUNNING"
    write_json(run_dir / "identity.json", Identity("a", "b").as_json())
    cli.main(["tracking", "sync", str(run_dir)])
    assert "marked as failed" in capsys.readouterr().out and recorded(run_dir)[0].info.status == "FAILED"
    cli.main(["tracking", "sync", str(run_dir)])
    assert "0 records and files sent\n" in capsys.readouterr().out
    again = Mlflow(store=str(store), experiment="killed")
    again.open(run_dir, {}, {}, step=30)
    for step in range(31, 61):
        again.log(step, {"train/loss": float(step)})
    close(again, run_dir)
    assert history(run_dir, "train/loss") == [(step, float(step)) for step in range(1, 61)]
    assert recorded(run_dir)[0].info.status == "FINISHED"


@pytest.mark.slow
def test_a_server_killed_and_started_again_loses_nothing(run_dir, store):
    port = free_port()
    server = start_server(store, port)
    try:
        (run_dir / "config.yaml").write_text("a: 1\n")
        tracks = Mlflow(uri=f"http://127.0.0.1:{port}", experiment="server")
        tracks.open(run_dir, CONFIG, {"git_commit": "abc"})
        slowest = 0.0

        def log(steps):
            nonlocal slowest
            for step in steps:
                start = time.monotonic()
                tracks.log(step, {"train/loss": float(step), "valid/loss/a": math.nan if step == 7 else 1.0})
                slowest = max(slowest, time.monotonic() - start)
                time.sleep(0.01)

        log(range(1, 101))
        kill_server(server)
        log(range(101, 401))
        server = start_server(store, port)
        log(range(401, 501))
        deadline = time.monotonic() + 60
        while tracks._spool.pending() and time.monotonic() < deadline:
            time.sleep(0.2)
        kill_server(server)
        log(range(501, 521))
        start = time.monotonic()
        tracks.close("finished")
        assert time.monotonic() - start < FEW_SECONDS and slowest < 1
        server = start_server(store, port)
        assert sync(run_dir) > 0
        run, _ = recorded(run_dir)
        assert run.info.status == "FINISHED"
        assert history(run_dir, "train/loss") == [(step, float(step)) for step in range(1, 521)]
        assert len(history(run_dir, "valid/loss/a")) == 520
        assert artifacts(run_dir) == {"config.yaml"}
        assert f":{port}/#/experiments/{run.info.experiment_id}/runs?" in tracks.where()
    finally:
        kill_server(server)
