"""The runs of an MLflow experiment."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.config.identity import CONTENTS
from mft.files.json_file import read_json
from mft.runs.facts import facts
from mft.runs.folders import TEST
from mft.runs.results import Run, compared, with_contents
from mft.tracking.params import TAG_LIMIT, safe_name
from mft.tracking.store import histories, runs_of
from mft.training.provenance import fingerprint_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

BY_STEP = ("valid/loss", "train/loss", "train/weight")
"""Metrics that a comparison needs by step, and those of every task; it is asked for others."""

OF_TASKS = (
    *("valid/loss", "valid/perplexity", "best/valid/loss", "test/loss"),
    *("train/loss", "train/weight", "train/tokens", "train/samples"),
)
"""Begin the names of metrics that end in the name of a task."""

STATES = {"KILLED": "stopped"}
"""State in MLflow → ours, where it is not the same word: a run that was stopped has saved a checkpoint."""


def read_experiment(client: MlflowClient, experiment: str, title: str, metrics: Iterable[str]) -> list[Run]:
    """Returns the runs of an experiment, by its id; what they did not record is left out.

    title: its name; metrics: those to read by step besides losses and weights, as the folder of a run names
    them. Of all others the last value is there.
    """
    asked = {safe_name(metric): metric for metric in metrics}
    found = {run.info.run_id: run for run in runs_of(client, experiment)}
    called = {run_id: _real_names(run, asked) for run_id, run in found.items()}
    wanted: dict[str, list[str]] = {}
    for run_id, run in found.items():
        for metric in run.data.metrics:
            if metric in asked or "/".join(metric.split("/", 2)[:2]) in BY_STEP:
                wanted.setdefault(metric, []).append(run_id)
    by_step: dict[str, dict[int, dict[str, Any]]] = {run_id: {} for run_id in found}
    for run_id, metric, step, value in histories(client, wanted):
        row = by_step[run_id].setdefault(step, {"step": step})
        row[called[run_id].get(metric, metric)] = value
    results = []
    names = Counter(run.info.run_name for run in found.values())
    for run_id, run in found.items():
        rows = [row for _, row in sorted(by_step[run_id].items())]
        once = names[run.info.run_name] == 1
        where = f"{title}/{run.info.run_name}" + ("" if once else f" ({run_id[:8]})")
        results.append(_result(run, rows, called[run_id], where))
    return results


def _real_names(run: MlflowRun, asked: Mapping[str, str]) -> dict[str, str]:
    """Returns {name in MLflow: name in the run's folder} of the metrics whose names may differ."""
    names = [f"{prefix}/{task}" for task in _tasks(run.data.tags) for prefix in OF_TASKS]
    return {safe: name for name in names if (safe := safe_name(name)) != name} | dict(asked)


def _result(run: MlflowRun, rows: list[dict[str, Any]], called: Mapping[str, str], where: str) -> Run:
    info, tags = run.info, run.data.tags
    finite = {name: value for name, value in run.data.metrics.items() if math.isfinite(value)}
    last = {called.get(name, name): value for name, value in finite.items()}
    values = compared({key: _as_in_a_folder(text) for key, text in run.data.params.items()})
    # The version that tags fingerprints tags the tasks, too.
    known = {kind: tags[tag] for kind in CONTENTS if (tag := fingerprint_tag(kind)) in tags}
    prints = known if "tasks" in tags else None
    took = (info.end_time - info.start_time) / 1000 if info.end_time else None
    name = tags.get("name") or info.run_name or info.run_id
    place = f"{tags['run_folder']} {tags.get('identity', '')}" if tags.get("run_folder") else ""
    started = datetime.fromtimestamp(info.start_time / 1000).astimezone().isoformat(timespec="seconds")
    trained = [row["step"] for row in rows if any(name in row for name in ("train/loss", "valid/loss"))]
    result = Run(
        name=name,
        values=values,
        rows=rows,
        state=STATES.get(info.status, info.status.lower()),
        seconds=last.get("total/seconds", took),
        memory=last.get("total/peak_memory_gib", last.get("memory/peak_gib")),
        command=_command(tags),
        where=where,
        folder=_folder(tags),
        key=tags.get("run_key", ""),
        place=place,
        tokens=last.get("total/tokens"),
        flops=last.get("total/flops"),
        test={name.removeprefix(TEST): loss for name, loss in last.items() if name.startswith(TEST)},
        test_step=int(last["test/step"]) if "test/step" in last else None,
        metrics=last,
    )
    total = float(tags["total_steps"]) if tags.get("total_steps", "").isdigit() else None
    tasks = _tasks(tags) or sorted(result.tasks)
    result.values |= with_contents(tasks, tags.get("data_fingerprint", ""), prints)
    result.facts = facts(
        {"started": started} | tags,
        result.values,
        _object(tags, "data_sizes"),
        max(trained, default=None),
        total,
    )
    return result


def _command(tags: Mapping[str, str]) -> str:
    """Returns the command that was recorded; a comment for the shell where it was cut."""
    command = tags.get("command", "")
    if len(command) < TAG_LIMIT - 1:
        return command
    return f"# longer than MLflow keeps; see overrides.json in {tags.get('run_folder', 'the run folder')}"


def _folder(tags: Mapping[str, str]) -> Path | None:
    """Returns the folder of a run, where it is on this machine and still this run's."""
    folder, key = Path(tags.get("run_folder", "")), tags.get("run_key")
    return folder if key and read_json(folder / "mlflow.json").text("key") == key else None


def _as_in_a_folder(text: str) -> str:
    """Returns a number as `results.flat` writes it; MLflow has 2.0 where that has 2."""
    try:
        number = float(text)
    except ValueError:
        return text
    return text if text.lstrip("-").isdigit() or not math.isfinite(number) else f"{number:g}"


def _tasks(tags: Mapping[str, str]) -> list[str]:
    tasks = _json(tags, "tasks")
    return [str(task) for task in tasks] if isinstance(tasks, list) else []


def _object(tags: Mapping[str, str], name: str) -> dict[str, Any]:
    value = _json(tags, name)
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _json(tags: Mapping[str, str], name: str) -> Any:
    """Returns what a tag holds; None where it was cut, or is another program's."""
    try:
        return json.loads(tags.get(name, "null"))
    except ValueError:
        return None
