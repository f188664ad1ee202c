"""Runs of folders and of MLflow stores: what is read of them, and that each counts once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mft.errors import UserError
from mft.files.json_file import write_json
from mft.runs.folders import read_run
from mft.runs.places import at
from mft.tracking import store
from mft.tracking.mlflow import Mlflow
from mft.tracking.store import client_for, prepare
from tests.tracking.server import free_port, kill_server, start_server

ROWS = [
    {"step": 1, "train/loss": 3.0, "lr": 1e-3},
    {"step": 2, "valid/loss": 2.0, "valid/loss/c++": 1.0, "valid/loss/sql": 3.0, "train/weight/c++": 0.5},
    {
        "step": 4,
        "valid/loss": 1.5,
        "valid/loss/c++": 1.0,
        "valid/loss/sql": 2.0,
        "speed/tokens_per_second": 9.0,
    },
    {"step": 4, "best/step": 4, "best/valid/loss": 1.5, "test/loss": 1.7, "test/loss/c++": 1.1}
    | {"test/loss/sql": 2.3, "test/step": 4, "total/tokens": 1e6, "total/flops": 1e15, "total/seconds": 60.0},
]
TAGS = {
    "name": "coba · s2",
    "command": "cd /x && mft train loss=coba",
    "tasks": '["c++", "sql"]',
    "data_fingerprint": "0123456789abcdef",
    "base_model_fingerprint": "fedcba9876543210",
    "data_sizes": '{"c++": {"train": 90, "valid": 6, "test": 4}}',
    "total_steps": "4",
    "git_commit": "a" * 40,
    "git_dirty": "true",
    "device": "NVIDIA H100",
    "ranks": "8",
}


def leave(folder: Path, seed: int = 2) -> Path:
    """Leaves what a finished run leaves, as far as it is read."""
    folder.mkdir(parents=True)
    config = {"loss": {"tau": 2.0}, "train": {"seed": seed}, "choices": {"loss": "coba"}}
    (folder / "config.yaml").write_text(json.dumps(config))
    fingerprints = {"base model": "fedcba9876543210"}
    parts = {"tasks": ["c++", "sql"], "choices": {}, "values": {}, "fingerprints": fingerprints}
    write_json(folder / "identity.json", {"version": 2, "identity": f"{seed}" * 40, "base": "b"} | parts)
    write_json(folder / "plan.json", {"total_steps": 4, "tasks": ["c++", "sql"]})
    record = {
        "overrides": ["loss=coba"],
        "name": TAGS["name"],
        "folder": "/x",
        "data": TAGS["data_fingerprint"],
    }
    write_json(folder / "overrides.json", record)
    write_json(folder / "provenance.json", TAGS | {"started": "2026-01-01T00:00:00+00:00"})
    write_json(folder / "report" / "data.json", {"c++": {"splits": {"train": 90, "valid": 6, "test": 4}}})
    test = {"step": 4, "test/loss": 1.7, "test/loss/c++": 1.1, "test/loss/sql": 2.3}
    totals = {"seconds": 60.0, "tokens": 1e6, "flops": 1e15, "peak_memory_gib": 3.5}
    write_json(folder / "summary.json", {"status": "finished", "steps": 4, "test": test} | totals)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def send(folder: Path, uri: str, experiment: str = "one") -> None:
    """Sends a run folder to a store as a tracker does."""
    tracker = Mlflow(uri=uri, experiment=experiment)
    tracker.open(folder, {}, TAGS | {"run_folder": str(folder.resolve()), "identity": "2" * 40})
    tracker.close("finished")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as MLflow makes it, which takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    prepare(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_a_store_tells_of_a_run_what_its_folder_tells(uri: str) -> None:
    folder = leave(Path("runs/a"))
    send(folder, uri)
    (here,), (there,) = at(["runs"])[0], at(["one"])[0]
    assert (
        there.store == uri and here.store == "" and there.where == "one/coba · s2" and here.where == "runs/a"
    )
    assert there.folder == folder.resolve() and here.folder == folder
    for run in (here, there):
        assert (run.name, run.seed, run.state, run.tasks) == ("coba · s2", 2, "finished", ["c++", "sql"])
        assert (run.tokens, run.flops, run.seconds, run.test_step) == (1e6, 1e15, 60.0, 4)
        assert run.test == {"c++": 1.1, "sql": 2.3}
        assert run.series("mean") == [(2, 2.0), (4, 1.5)] and run.series("c++") == [(2, 1.0), (4, 1.0)]
        assert run.best("test/loss/c++") == 1.1 and run.best("total/flops") == 1e15
        assert run.best("speed/tokens_per_second", higher=True) == 9.0 and run.best("lr") == 1e-3
        assert (
            run.values["loss"] == "coba"
            and run.values["loss.tau"] == "2"
            and run.values["task"] == "[c++,sql]"
        )
        assert run.values["data fingerprint"] == "01234567"
        assert run.facts["commit"] == "aaaaaaaaaaaa with uncommitted changes" and run.facts["ranks"] == "8"
        assert run.facts["steps"] == "4 of 4" and run.facts["data"]["c++"]["test"] == 4
        assert run.facts["base model"] == "fedcba987654" and run.facts["started"].startswith("20")
    assert here.command == "cd /x && mft train loss=coba train.resume=never" and here.memory == 3.5
    assert there.command == TAGS["command"]


def test_a_run_that_is_met_twice_counts_once(uri: str) -> None:
    folder = leave(Path("runs/a"))
    leave(Path("runs/b"), seed=3)
    send(folder, uri)
    client = client_for(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("one").experiment_id])
    client.log_metric(run.info.run_id, "pass_at_1", 0.5, step=4)
    for places in (["one", "runs"], ["runs", "one"], ["runs", "runs/a"]):
        runs, (note,) = at(places, metrics=["pass@1"])
        assert sorted(run.where for run in runs) == ["runs/a", "runs/b"], "of two readings, the folder's"
        assert note.startswith("1 run was met twice and counts once")
        if "one" in places:
            (sent,) = [run for run in runs if run.where == "runs/a"]
            assert sent.series("pass@1") == [(4, 0.5)], "what only the store has"
    assert at(["runs"]).notes == [] and len(at(["runs", "one", "runs"]).runs) == 2


def test_a_run_trained_again_in_its_place_is_another(uri: str) -> None:
    folder = leave(Path("runs/a"))
    send(folder, uri)
    shutil.rmtree(folder)
    send(leave(Path("runs/a")), uri)
    runs, notes = at(["runs", "one"])
    assert len(runs) == 2 and len(notes) == 1
    assert {run.folder for run in runs} == {folder, None}, "the folder is of the second"


def test_a_store_beside_folders_is_told_to_be_of_no_use(uri: str) -> None:
    leave(Path("runs/a"))
    assert at(["runs"]).notes == []
    assert at(["runs"], [uri]).notes == [
        "--uri has no effect: the places are folders, and no experiment is looked for."
    ]


def test_an_experiment_is_looked_for_in_every_store(uri: str, empty_store: Path) -> None:
    shutil.copy(empty_store, "other.db")
    uris = [uri, f"sqlite:///{Path('other.db').resolve()}"]
    send(leave(Path("runs/a")), uris[0])
    send(leave(Path("runs/b"), seed=3), uris[1])
    send(leave(Path("runs/c"), seed=4), uris[1], "two")
    found = at(["one"], uris).runs
    assert {run.place for run in found} == {f"{Path('runs', name).resolve()} {'2' * 40}" for name in "ab"}
    assert [run.where for run in at(["two"], uris).runs] == ["two/coba · s2"]
    with pytest.raises(UserError, match=r"tow is neither a folder nor an experiment of .*; did you mean two"):
        at(["tow"], uris)


def test_a_store_that_cannot_be_read_is_named_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no MLflow store here \(mlflow.db\)"):
        at(["one"])
    with pytest.raises(UserError, match=r"--uri sqlite:///no\.db: there is no such file"):
        at(["one"], ["sqlite:///no.db"])
    with pytest.raises(UserError, match=r"--uri http://\*\*\*@127\.0\.0\.1:9/: cannot be read: ") as refused:
        at(["one"], ["http://me:secret@127.0.0.1:9/"])
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_every_page_and_every_run_of_a_question_is_read(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_for(uri)
    experiment = client.create_experiment("many")
    for number in range(5):
        run = client.create_run(experiment, run_name=f"r{number}").info.run_id
        for step in (3, 1, 2):
            client.log_metric(run, "valid/loss/x", math.nan if step == 3 else number + step, step=step)
        client.log_metric(run, "other", number)
    monkeypatch.setattr(store, "PAGE", 2)
    monkeypatch.setattr(store, "AT_ONCE", 2)
    runs = {run.name: run for run in at(["many"]).runs}
    assert sorted(runs) == [f"r{number}" for number in range(5)]
    assert all(runs[f"r{n}"].series("x") == [(1, n + 1.0), (2, n + 2.0)] for n in range(5))
    assert runs["r4"].best("other") == 4.0
    again = client.create_run(experiment, run_name="r4").info.run_id
    wheres = [run.where for run in at(["many"]).runs]
    assert "many/r3" in wheres and f"many/r4 ({again[:8]})" in wheres and len(set(wheres)) == 6
    assert "other" in runs["r4"].names() and runs["r4"].command == "" and runs["r4"].folder is None


def test_metrics_of_the_machine_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    folder = leave(tmp_path / "a")
    (folder / "system.jsonl").write_text('{"step": 10, "system/cpu_utilization_percentage": 50.0}\n')
    name = "system/cpu_utilization_percentage"
    assert read_run(folder).best(name) is None and read_run(folder, [name]).best(name) == 50.0


@pytest.mark.parametrize("damage", ["", "[]", '{"a": ', '{"overrides": 3, "name": [], "test": 1, "key": {}}'])
def test_what_is_damaged_is_left_out(tmp_path: Path, damage: str) -> None:
    folder = leave(tmp_path / "a")
    for file in folder.rglob("*.json*"):
        if file.name not in ("identity.json", "metrics.jsonl"):
            file.write_text(damage)
    (folder / "config.yaml").write_text("a: [")
    run = read_run(folder)
    assert run.name == "a" and run.best("mean") == 1.5 and run.tokens is None and run.test == {}


def test_a_long_command_that_a_store_has_cut_is_not_shown_as_one(uri: str) -> None:
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("long")).info.run_id
    client.set_tag(run, "command", "x" * 5000)
    client.set_tag(run, "run_folder", "/runs/a")
    assert at(["long"]).runs[0].command == "# longer than MLflow keeps; see overrides.json in /runs/a"


@pytest.mark.slow
@pytest.mark.long  # test_a_store_tells_of_a_run_what_its_folder_tells asks by the same client
def test_a_server_tells_what_its_database_tells(uri: str, tmp_path: Path) -> None:
    send(leave(Path("runs/a")), uri)
    send(leave(Path("runs/b"), seed=3), uri)
    port = free_port()
    server = start_server(tmp_path, port)
    try:
        remote = at(["one"], [f"http://127.0.0.1:{port}"]).runs
    finally:
        kill_server(server)
    for there, here in zip(remote, at(["one"]).runs, strict=True):
        assert (there.name, there.rows, there.metrics, there.facts) == (
            *(here.name, here.rows, here.metrics, here.facts),
        )
