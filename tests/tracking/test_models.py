"""Checkpoints as logged models of a real store: each once, with the losses of its step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mft.files.json_file import read_json, write_json
from mft.tracking.record import Record
from mft.tracking.sender import sync
from mft.tracking.store import client_for
from tests.tracking.folders import write_checkpoint, write_run


@pytest.fixture
def uri(store):
    return f"sqlite:///{store}/mlflow.db"


@pytest.fixture
def run_dir(tmp_path, uri, request):
    return write_run(tmp_path / "run", uri, experiment=request.node.name)


def logged(run_dir):
    """The run of a folder as its store has it, and its models by name and step."""
    record = Record.read(run_dir)
    client = client_for(record.uri)
    run = client.get_run(record.run_id)
    models = client.search_logged_models([run.info.experiment_id])
    assert len({(model.name, model.tags["step"]) for model in models}) == len(models), "one is there twice"
    return run, {f"{model.name} {model.tags['step']}": model for model in models}


def metrics_of(model):
    return {metric.key: metric.value for metric in model.metrics or []}


def test_every_kept_checkpoint_is_a_model_with_the_losses_of_its_step(run_dir):
    sync(run_dir)
    run, models = logged(run_dir)
    assert set(models) == {"step-2 2", "step-4 4", "step-6 6", "final 6"}
    assert {model.status for model in models.values()} == {"READY"}
    assert {model.source_run_id for model in models.values()} == {run.info.run_id}
    outputs = {output.model_id: output.step for output in run.outputs.model_outputs}
    assert outputs == {model.model_id: int(model.tags["step"]) for model in models.values()}
    params = {"model": "tiny", "peft": "lora", "loss": "coba", "optimizer.lr": "0.002"}
    assert models["final 6"].params == params
    assert models["step-2 2"].tags["path"] == str(run_dir / "checkpoints" / "step-2")
    assert metrics_of(models["step-2 2"]) == {
        "valid/loss": 1.0,
        "valid/loss/docs": 0.5,
        "valid/loss/code": 1.5,
    }
    assert metrics_of(models["final 6"]) == metrics_of(models["step-6 6"])
    tested = {"test/loss": 0.75, "test/loss/docs": 0.25, "test/loss/code": 1.25}
    assert metrics_of(models["step-4 4"]).items() >= tested.items()
    assert "test/loss" not in metrics_of(models["final 6"]), "other weights were tested"
    (dataset,) = {
        (metric.dataset_name, metric.dataset_digest)
        for model in models.values()
        for metric in model.metrics
        if metric.key.endswith("/docs")
    }
    assert dataset in {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs}
    assert not any(
        Path(model.artifact_location.removeprefix("file://")).exists() for model in models.values()
    )


def test_the_run_has_its_points_once(run_dir):
    sync(run_dir)
    run, _ = logged(run_dir)
    client = client_for(Record.read(run_dir).uri)
    for name, steps in {"valid/loss/docs": [2, 4, 6], "test/loss": [6], "best/valid/loss": [6]}.items():
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == steps
    order = client.search_runs([run.info.experiment_id], order_by=["metrics.`best/valid/loss` ASC"])
    assert order[0].data.metrics["best/valid/loss/docs"] == pytest.approx(1 / 6)


def test_a_second_sending_makes_no_second_model_wherever_the_first_was_killed(run_dir):
    assert sync(run_dir)[0] > 0 and sync(run_dir) == (0, False)
    run, models = logged(run_dir)
    client = client_for(Record.read(run_dir).uri)
    # As kills leave it: a model that is not ready, one that no run names, none of it noted.
    params = [run.info.experiment_id, "step-8", run.info.run_id, {"step": "8"}]
    left = client.create_logged_model(*params)
    write_checkpoint(run_dir, 8)
    record = read_json(run_dir / "mlflow.json")
    write_json(run_dir / "mlflow.json", record | {"uploaded": {}})
    sync(run_dir)
    run, again = logged(run_dir)
    assert set(again) == {*models, "step-8 8"} and again["step-8 8"].model_id == left.model_id
    assert {model.status for model in again.values()} == {"READY"}
    assert sorted(o.model_id for o in run.outputs.model_outputs) == sorted(m.model_id for m in again.values())
    assert {name: len(model.metrics or []) for name, model in again.items()} == {
        "step-2 2": 3, "step-4 4": 6, "step-6 6": 3, "final 6": 3, "step-8 8": 0
    }  # fmt: skip


def test_a_run_trained_further_has_both_final_models_and_those_of_removed_checkpoints(run_dir, uri):
    sync(run_dir)
    record = Record.read(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-2")
    write_run(run_dir, uri, steps=(4, 6, 8), tested=8, experiment=record.experiment, key=record.key)
    sync(run_dir)
    _, models = logged(run_dir)
    assert set(models) == {"step-2 2", "step-4 4", "step-6 6", "step-8 8", "final 6", "final 8"}
    assert metrics_of(models["final 8"])["test/loss"] == metrics_of(models["step-8 8"])["test/loss"] == 0.625


def test_another_store_receives_the_models_as_well(run_dir, other_store):
    sync(run_dir)
    sync(run_dir, other_store)
    run, models = logged(run_dir)
    assert len(models) == len(run.outputs.model_outputs) == 4 and run.data.tags["mlflow.note.content"]


def test_losses_that_are_no_numbers_stay_out_of_a_model(run_dir):
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    first = json.loads(rows[0]) | {"valid/loss": None, "valid/loss/docs": None}
    (run_dir / "metrics.jsonl").write_text("\n".join([json.dumps(first), *rows[1:]]) + "\n")
    sync(run_dir)
    assert metrics_of(logged(run_dir)[1]["step-2 2"]) == {"valid/loss/code": 1.5}
