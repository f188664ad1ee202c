"""The checkpoints of a run folder as MLflow's logged models: what they are, where, and how good.

Weights stay where they are; a model has the path of its folder, and the losses of its step as its metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.console.credentials import hidden
from mft.files.json_file import read_json
from mft.run_folder import metric_rows
from mft.tracking.datasets import dataset_inputs
from mft.tracking.params import TAG_LIMIT, VALUE_LIMIT, cut, safe_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

LOSSES = ("valid/loss", "test/loss")
POINTS_A_CALL = 1000  # MLflow's own limit of one log_batch
MODELS_A_CALL = 100
SHOWN = ("mlflow.user", "mlflow.source.name", "mlflow.source.type")  # of the run, on a model's page
PARAMS = ("choices.model", "model.path", "choices.peft", "choices.loss", "optimizer.lr", "train.seed")


def kept_models(run_dir: Path, finished: bool) -> dict[tuple[str, int], Path]:
    """Returns {(name, step): folder} of the complete checkpoints, and of final/ once the run has finished."""
    found = {}
    for mark in run_dir.glob("checkpoints/step-*/COMPLETE"):
        step = mark.parent.name.removeprefix("step-")
        if step.isdecimal():
            found[mark.parent.name, int(step)] = mark.parent
    steps = read_json(run_dir / "summary.json").number("steps")
    if finished and steps is not None and (run_dir / "final").is_dir():
        found["final", int(steps)] = run_dir / "final"
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0])))


def send_models(
    client: MlflowClient,
    run_id: str,
    run_dir: Path,
    params: Mapping[str, str],
    finished: bool,
    alive: Callable[[], None],
) -> int:
    """Makes the store's models of a run those of its folder, each once; returns how many were new.

    params: the flat config. A kill between two calls is mended the next time: the store says which models it
    has, whether they are ready and whether they are outputs of the run. Models whose folders have been
    removed stay.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    kept = kept_models(run_dir, finished)
    if not kept:
        return 0
    run = client.get_run(run_id)
    there: dict[tuple[str, int], LoggedModel] = {}
    for model in _models_of(client, run.info.experiment_id, run_id):
        if (known := model.tags.get("step", "")).isdecimal():
            there[model.name, int(known)] = model
    chosen = {name.removeprefix("choices."): value for name in PARAMS if (value := params.get(name))}
    for (name, step), folder in kept.items():
        if (name, step) not in there:
            tags = {"step": str(step), "path": cut(hidden(str(folder.resolve())), TAG_LIMIT)}
            tags |= {tag: run.data.tags[tag] for tag in SHOWN if tag in run.data.tags}
            there[name, step] = client.create_logged_model(
                run.info.experiment_id,
                name,
                run_id,
                tags,
                {k: cut(v, VALUE_LIMIT) for k, v in chosen.items()},
            )
        if there[name, step].status != LoggedModelStatus.READY:
            client.finalize_logged_model(there[name, step].model_id, LoggedModelStatus.READY)
        alive()
    linked = {output.model_id for output in (run.outputs.model_outputs if run.outputs else [])}
    models = {(name, step): there[name, step].model_id for name, step in kept}
    new = [LoggedModelOutput(i, step) for (_, step), i in models.items() if i not in linked]
    for start in range(0, len(new), MODELS_A_CALL):
        client.log_outputs(run_id, new[start : start + MODELS_A_CALL])
        alive()
    points = list(_points(client, run_id, run_dir, models))
    for start in range(0, len(points), POINTS_A_CALL):
        client.log_batch(run_id, metrics=points[start : start + POINTS_A_CALL])
        alive()
    return len(new)


def _models_of(client: MlflowClient, experiment_id: str, run_id: str) -> Iterator[LoggedModel]:
    token = None
    while True:
        found = client.search_logged_models(
            [experiment_id], f"source_run_id = '{run_id}'", max_results=MODELS_A_CALL, page_token=token
        )
        yield from found
        token = found.token
        if not token:
            return


def _points(
    client: MlflowClient, run_id: str, run_dir: Path, models: Mapping[tuple[str, int], str]
) -> Iterator[Metric]:
    """Yields the run's own points once more, each with the model whose weights it is of.

    They are read from the store: with the same name, step, time and value, the run has them once. NaN stays
    out, which a model would show as 0.
    """
    from mlflow.entities import Metric

    rows, _ = metric_rows(run_dir / "metrics.jsonl")
    inputs = dataset_inputs(run_dir)
    wanted: dict[str, dict[int, list[str]]] = {}  # metric → step of its point → models
    for row in rows:
        tested = row.get("test/step")
        for name in row:
            split = next((loss for loss in LOSSES if name == loss or name.startswith(f"{loss}/")), "")
            step = tested if split == "test/loss" else row["step"]
            ids = [model_id for (_, at), model_id in models.items() if split and at == step]
            if ids:
                wanted.setdefault(name, {})[row["step"]] = ids
    for name, by_step in wanted.items():
        task = name.split("/", 2)[2] if name.count("/") > 1 else ""
        dataset: Any = inputs[task].dataset if task in inputs else None
        of = (dataset.name, dataset.digest) if dataset else (None, None)
        for point in client.get_metric_history(run_id, safe_name(name)):
            for model_id in by_step.get(point.step, []) if math.isfinite(point.value) else []:
                yield Metric(point.key, point.value, point.timestamp, point.step, model_id, *of)
