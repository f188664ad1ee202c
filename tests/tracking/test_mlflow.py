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
import yaml

from mft import cli
from mft.config.identity import Identity
from mft.errors import UserError
from mft.files.json_file import write_json
from mft.tracking.base import FanOut, Jsonl
from mft.tracking.mlflow import PATIENCE, Mlflow
from mft.tracking.sender import sync
from mft.tracking.store import client_for
from tests.tracking.folders import sent
from tests.tracking.server import free_port, kill_server, start_server

FEW_SECONDS = 3 * PATIENCE
"""What a store that is down may cost: the code waits PATIENCE at most, the rest is for a machine that is
busy."""

CONFIG = {"optimizer": {"lr": 1e-5}, "task": {"docs": {"weight": 2.0}}}


@pytest.fixture
def tracker(store, request):
    def made(**fields):
        return FanOut([Jsonl(), Mlflow(**{"store": str(store), "experiment": request.node.name} | fields)])

    return made


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, CONFIG)
    return folder


def write_config(run_dir, config):
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


def close(tracks, run_dir, status="finished"):
    tracks.close(status)
    return sent(run_dir)


def recorded(run_dir, uri=None):
    """The run of a folder as its store has it: run, client."""
    state = json.loads((run_dir / "mlflow.json").read_text())
    client = client_for(uri or state["uri"])
    return client.get_run(state["run_id"]), client


def points(run_dir, name, uri=None):
    run, client = recorded(run_dir, uri)
    return client.get_metric_history(run.info.run_id, name)


def history(run_dir, name, uri=None):
    return sorted((point.step, point.value) for point in points(run_dir, name, uri))


def artifacts(run_dir, folder=None):
    run, client = recorded(run_dir)
    return {file.path for file in client.list_artifacts(run.info.run_id, folder)}


def test_a_run_is_there_with_all_it_was_given(tracker, run_dir, store):
    write_config(run_dir, CONFIG | {"choices": {"loss": "coba"}})
    (run_dir / "report").mkdir()
    (run_dir / "report" / "losses.png").write_bytes(b"png")
    tracks = tracker()
    tracks.open(run_dir, CONFIG, {"git_commit": "abc", "job": "loss=coba", "overrides": "[loss=coba]"})
    for step in (1, 2, 3):
        tracks.log(step, {"train/loss": 1 / step, "valid/loss/docs": 2.0})
    close(tracks, run_dir)
    run, _ = recorded(run_dir)
    assert run.info.status == "FINISHED" and run.info.run_name == "loss=coba"
    params = {"optimizer.lr": "1e-05", "task.docs.weight": "2.0", "loss": "coba", "choices.loss": "coba"}
    assert run.data.params == params
    assert run.data.tags["git_commit"] == run.data.tags["mlflow.source.git.commit"] == "abc"
    assert history(run_dir, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert [point.timestamp >= run.info.start_time for point in points(run_dir, "train/loss")] == [True] * 3
    assert artifacts(run_dir) == {"config.yaml", "report"} and artifacts(run_dir, "report") == {
        "report/losses.png"
    }
    assert run.info.artifact_uri.startswith((store / "mlartifacts").as_uri())
    command, page = tracks.where().split("\nthen open ")
    assert (
        command == f"mlflow ui --backend-store-uri sqlite:///{store}/mlflow.db --host 127.0.0.1 --port 5000"
    )
    assert page.startswith(f"http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}/runs?")


@pytest.mark.parametrize(
    ("run_name", "tags", "shown"),
    [
        (None, {"name": "coba lr=2e-3", "job": "loss=coba optimizer.lr=2e-3"}, "coba lr=2e-3"),
        ("mine", {"name": "coba"}, "mine"),
        (None, {}, "run"),
        (None, {"name": "<b>`x`|" + "n" * 300}, "<b>`x`|"),
    ],
)
def test_the_name_of_a_run(tracker, run_dir, run_name, tags, shown):
    tracks = tracker(run_name=run_name)
    tracks.open(run_dir, {}, tags)
    close(tracks, run_dir)
    name = recorded(run_dir)[0].info.run_name
    assert name == shown or (name.startswith(shown) and len(name) <= 200)


def test_answers_are_a_table_that_a_resumed_run_writes_again(tracker, run_dir):
    (run_dir / "report").mkdir()
    for answer in ("<b>one</b> | `x`", "two"):
        table = {"columns": ["prompt", "after"], "data": [["what?", answer], ["http://me:pw@h/", answer]]}
        write_json(run_dir / "report" / "answers.json", table)
        tracks = tracker()
        tracks.open(run_dir, {}, {})
        close(tracks, run_dir)
        run, client = recorded(run_dir)
        (shown,) = json.loads(run.data.tags["mlflow.loggedArtifacts"])
        assert shown == {"path": "report/answers.json", "type": "table"}
        stored = json.loads(Path(client.download_artifacts(run.info.run_id, shown["path"])).read_text())
        assert stored["data"] == [["what?", answer], ["http://***@h/", answer]]


@pytest.mark.parametrize(("status", "shown"), [("failed", "FAILED"), ("stopped", "KILLED")])
def test_how_it_ended(tracker, run_dir, status, shown):
    tracks = tracker()
    tracks.open(run_dir, {}, {})
    close(tracks, run_dir, status)
    assert recorded(run_dir)[0].info.status == shown


def test_many_and_long_and_refused(tracker, run_dir):
    config = {
        f"group{i}": {f"key@{j}": "v" * 20_000 if i == j == 0 else j for j in range(50)} for i in range(50)
    }
    write_config(run_dir, config | {"k" * 400: 1})
    tracks = tracker()
    tracks.open(run_dir, {}, {"long": "t" * 20_000, "a[b]": "x"})
    tracks.log(1, {"valid/pass@1": 0.5, "a[1]=b": 1.0, "../up": 2.0, "nan": math.nan, "inf": math.inf})
    close(tracks, run_dir)
    run, _ = recorded(run_dir)
    assert len(run.data.params) == 2501 and run.data.params["group3.key_at_7"] == "7"
    assert run.data.metrics["valid/pass_at_1"] == 0.5 and len(run.data.metrics) == 5
    assert (
        math.isnan(history(run_dir, "inf")[0][1]) and run.data.tags["infinite.inf"] == "inf, last at step 1"
    )


def test_a_resumed_run_goes_on_without_doubled_points(tracker, run_dir):
    first = tracker()
    first.open(run_dir, CONFIG, {})
    for step in (1, 2, 3, 4):
        first.log(step, {"train/loss": float(step)})
    close(first, run_dir, "failed")
    before = recorded(run_dir)[0].info.run_id
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "trai')  # a line the killed process did not finish
    write_config(run_dir, {"optimizer": {"lr": 2e-5}, "new": 1})
    again = tracker()
    again.open(run_dir, {}, {}, step=2)
    for step in (3, 4, 5):
        again.log(step, {"train/loss": float(step), "valid/loss/docs": 1.0})
    close(again, run_dir)
    run, client = recorded(run_dir)
    assert run.info.run_id == before and run.info.status == "FINISHED"
    assert history(run_dir, "train/loss") == [(step, float(step)) for step in (1, 2, 3, 4, 5)]
    assert history(run_dir, "valid/loss/docs") == [(3, 1.0), (4, 1.0), (5, 1.0)]
    assert run.data.params["optimizer.lr"] == "1e-05" and run.data.params["new"] == "1"
    assert (
        run.data.tags["changed.optimizer.lr"] == "1e-05 -> 2e-05"
        and run.data.tags["resumed_from_step"] == "2"
    )
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_what_was_sent_without_being_noted_is_not_doubled(tracker, run_dir):
    tracks = tracker()
    tracks.open(run_dir, CONFIG, {})
    for step in range(1, 4):
        tracks.log(step, {"train/loss": float(step)})
    close(tracks, run_dir)
    record = json.loads((run_dir / "mlflow.json").read_text())
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "valid/loss": 9.0}\n{"step": 4, "train/loss": 4.0}\n')
    for lost in (
        {"places": {}},
        {"places": {}, "run_id": ""},
    ):  # killed before noting points, or that the run is made
        (run_dir / "mlflow.json").write_text(json.dumps(record | lost))
        sync(run_dir)
        assert recorded(run_dir)[0].info.run_id == record["run_id"]
        assert history(run_dir, "train/loss") == [(step, float(step)) for step in range(1, 5)]
        assert history(run_dir, "valid/loss") == [(3, 9.0)]
    assert sync(run_dir) == (0, False)


def test_a_file_that_was_cut_back_and_has_grown_again_is_sent_from_its_start(tracker, run_dir):
    """As a run leaves it that was resumed without MLflow."""
    tracks = tracker()
    tracks.open(run_dir, CONFIG, {})
    for step in (2, 4, 6):
        tracks.log(step, {"train/loss": float(step)})
    close(tracks, run_dir)
    again = Jsonl()
    again.open(run_dir, {}, {}, step=2)
    for step in range(3, 9):
        again.log(step, {"train/loss": float(step)})
    sync(run_dir)
    assert history(run_dir, "train/loss") == [(step, float(step)) for step in range(2, 9)]


def test_the_run_can_be_sent_to_another_store_and_again_to_one_that_lost_it(tracker, run_dir, other_store):
    tracks = tracker()
    tracks.open(run_dir, CONFIG, {})
    tracks.log(1, {"train/loss": 1.0})
    close(tracks, run_dir)
    assert sync(run_dir, other_store) == (2, False) and sync(run_dir, other_store) == (0, False)
    run, client = recorded(run_dir, other_store)
    assert (
        history(run_dir, "train/loss", other_store) == [(1, 1.0)]
        and run.data.params["optimizer.lr"] == "1e-05"
    )
    client.delete_run(run.info.run_id)
    assert sync(run_dir) == (2, False)
    assert recorded(run_dir)[0].info.lifecycle_stage == "active" and history(run_dir, "train/loss") == [
        (1, 1.0)
    ]


def test_a_run_of_an_earlier_version_that_was_never_sent_is_sent_from_its_folder(run_dir, store):
    """Its record lacks what is written today; the outcome is the summary's, as of a run killed while it
    closed."""
    uri = f"sqlite:///{store}/mlflow.db"
    earlier = {"uri": uri, "run_id": None, "experiment_id": None, "sent": 0, "left": []}
    (run_dir / "mlflow.json").write_text(json.dumps(earlier))
    write_config(run_dir, CONFIG | {"name": "earlier"})
    (run_dir / "summary.json").write_text('{"status": "stopped"}')
    (run_dir / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/loss": null}\n'
    )
    assert sync(run_dir) == (4, False) and sync(run_dir) == (0, False)
    run, client = recorded(run_dir)
    assert client.get_experiment(run.info.experiment_id).name == "earlier" and run.info.run_name == "run"
    assert run.info.status == "KILLED" and run.data.params["optimizer.lr"] == "1e-05"
    assert [step for step, _ in history(run_dir, "train/loss")] == [1, 2]
    assert artifacts(run_dir) == {"config.yaml", "summary.json"}


def test_a_model_is_kept_only_where_it_is_to_be_registered(tracker, run_dir):
    (run_dir / "final").mkdir()
    (run_dir / "final" / "config.json").write_text("{}")
    for name, status in ((None, "finished"), ("code-model", "failed"), ("code-model", "finished")):
        tracks = tracker(register_as=name)
        tracks.open(run_dir, {}, {})
        close(tracks, run_dir, status)
        assert artifacts(run_dir) == {"config.yaml"} | ({"final"} if name and status == "finished" else set())
    run, client = recorded(run_dir)
    (version,) = client.search_model_versions("name = 'code-model'")
    assert version.run_id == run.info.run_id and version.source.endswith("/final")


def test_checkpoints_are_kept_on_request(tracker, run_dir):
    (run_dir / "checkpoints" / "step-2").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-2" / "COMPLETE").write_text("")
    (run_dir / "checkpoints" / "step-4").mkdir()
    (run_dir / "checkpoints" / "step-4" / "weights").write_text("killed while it was saved")
    for wanted in (False, True):
        tracks = tracker(checkpoints=wanted)
        tracks.open(run_dir, {}, {})
        close(tracks, run_dir)
        assert artifacts(run_dir) == {"config.yaml"} | ({"checkpoints"} if wanted else set())
    assert artifacts(run_dir, "checkpoints") == {"checkpoints/step-2"}
    assert artifacts(run_dir, "checkpoints/step-2") == {"checkpoints/step-2/COMPLETE"}


def test_the_report_of_a_sweep_is_a_run_without_points_and_is_renewed(tracker, tmp_path):
    run_dir = tmp_path
    for text in ("first", "second"):  # the sweep goes on, and its report is written again
        (run_dir / "report.html").write_text(text)
        mlflow = tracker().trackers[1]
        mlflow.report(run_dir, run_dir / "report.html", {"sweep": "abc", "name": "small"})
        sent(run_dir)
    run, client = recorded(run_dir)
    assert (
        run.info.run_name == "report of sweep abc"
        and run.info.status == "FINISHED"
        and run.data.tags["sweep"] == "abc"
    )
    assert not run.data.metrics and not run.data.params
    assert Path(client.download_artifacts(run.info.run_id, "report.html")).read_text() == "second"
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_system_metrics_on_request(tracker, run_dir):
    tracks = tracker(system_metrics=True)
    tracks.open(run_dir, {}, {})
    deadline = time.monotonic() + 120
    while not (run_dir / "system.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    close(tracks, run_dir)
    assert "system/cpu_utilization_percentage" in recorded(run_dir)[0].data.metrics


def test_credentials_reach_nothing(tracker, run_dir, caplog):
    caplog.set_level(logging.DEBUG, "mft")
    uri = "http://me:hunter2@127.0.0.1:9"  # nobody listens on port 9
    config = {"tracking": {"mlflow": {"uri": uri}}}
    write_config(run_dir, config)
    tracks = tracker(uri=uri)
    tracks.open(run_dir, config, {"overrides": f"[tracking.mlflow.uri={uri}]"})
    tracks.close("finished")
    with pytest.raises(UserError) as told:
        sync(run_dir, uri)
    written = "".join(path.read_text() for path in run_dir.iterdir() if path.name != "config.yaml")
    assert "hunter2" not in caplog.text + str(told.value) + tracks.where() + written
    good = tracker().where().split()[3]
    assert sync(run_dir, good) == (1, False)
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
    assert [record.message.count("Training continues") for record in caplog.records].count(1) == 1
    assert "mft tracking sync" in caplog.text
    assert sync(run_dir, tracker().where().split()[3]) == (1001, False)
    run, _ = recorded(run_dir)
    assert run.info.status == "FINISHED" and run.data.params["optimizer.lr"] == "1e-05"
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
    with pytest.raises(UserError, match=r"mlflow\.json"):
        sync(Path("nowhere"))


KILLED = """
import os, sys, time
from pathlib import Path
from mft.tracking.base import FanOut, Jsonl
from mft.tracking.mlflow import Mlflow
tracker = FanOut([Jsonl(), Mlflow(store=sys.argv[1], experiment="killed")])
tracker.open(Path(sys.argv[2]), {}, {})
for step in range(1, 51):
    tracker.log(step, {"train/loss": float(step)})
    time.sleep(0.02)
until = time.monotonic() + 120
while '"metrics.jsonl"' not in (Path(sys.argv[2]) / "mlflow.json").read_text():
    assert time.monotonic() < until, "nothing was sent"
    time.sleep(0.02)
os._exit(9)
"""


def test_a_run_killed_by_force_is_marked_and_taken_up_again(store, run_dir, capsys):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(store), str(run_dir)], timeout=150)
    assert killed.returncode == 9
    assert recorded(run_dir)[0].info.status == "RUNNING"
    write_json(run_dir / "identity.json", Identity("a", "b").as_json())
    cli.main(["tracking", "sync", str(run_dir)])
    assert "marked as failed" in capsys.readouterr().out and recorded(run_dir)[0].info.status == "FAILED"
    cli.main(["tracking", "sync", str(run_dir)])
    assert ": 0 points and files sent\n" in capsys.readouterr().out
    again = FanOut([Jsonl(), Mlflow(store=str(store), experiment="killed")])
    again.open(run_dir, {}, {}, step=30)
    for step in range(31, 61):
        again.log(step, {"train/loss": float(step)})
    close(again, run_dir)
    assert history(run_dir, "train/loss") == [(step, float(step)) for step in range(1, 61)]
    assert recorded(run_dir)[0].info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.long
def test_a_server_killed_and_started_again_loses_nothing(run_dir, store):
    port = free_port()
    server = start_server(store, port)
    try:
        tracks = FanOut([Jsonl(), Mlflow(uri=f"http://127.0.0.1:{port}", experiment="server")])
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
        while history(run_dir, "train/loss")[-1:] != [(500, 500.0)] and time.monotonic() < deadline:
            time.sleep(0.5)
        kill_server(server)
        log(range(501, 521))
        start = time.monotonic()
        tracks.close("finished")
        assert time.monotonic() - start < FEW_SECONDS and slowest < 1
        server = start_server(store, port)
        assert sync(run_dir)[0] > 0
        run, _ = recorded(run_dir)
        assert run.info.status == "FINISHED"
        assert history(run_dir, "train/loss") == [(step, float(step)) for step in range(1, 521)]
        assert len(history(run_dir, "valid/loss/a")) == 520
        assert artifacts(run_dir) == {"config.yaml"}
        assert f":{port}/#/experiments/{run.info.experiment_id}/runs?" in tracks.where()
    finally:
        kill_server(server)
