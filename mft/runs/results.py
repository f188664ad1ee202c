"""Runs read back: from their folders, or from an MLflow experiment."""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft import run_folder
from mft.config import yaml_file
from mft.config.identity import CONTENTS, VERSION, identity_of
from mft.config.inputs import CANNOT_CHANGE_THE_RESULT, under
from mft.errors import UserError, nearest
from mft.files.json_file import read_json
from mft.objective import criterion
from mft.training.provenance import fingerprint_tag

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.store.entities import PagedList

NOT_COMPARED = (
    *(key for key in CANNOT_CHANGE_THE_RESULT if "batch_size" not in key),
    # Of these, the names of the tasks and the fingerprint of the data tell more.
    *("task.*.paths", "task.*.valid", "task.*.name"),
)

FINGERPRINT = " fingerprint"
"""Ends the keys of `Run.values` that are hashes of contents: the data's, and those of `identity.CONTENTS`."""

DATA = f"data{FINGERPRINT}"

PAGE = 1000
"""Runs asked of an MLflow store at once."""


@dataclass
class Run:
    """What one run folder, or one run of an MLflow experiment, holds."""

    name: str
    """The folder as seen from here, or the run's name in MLflow."""

    values: dict[str, str]
    """The flat config, with the option chosen of every group. `task` holds the names of all tasks in order;
    keys that end in FINGERPRINT hold hashes of contents, where they were recorded."""

    rows: list[dict[str, Any]]
    """metrics.jsonl."""

    state: str
    """running, finished, pruned, stopped, failed or killed."""

    seconds: float | None = None
    """How long it took; None where that was not recorded."""

    memory: float | None = None
    """Peak memory in GiB; None where that was not recorded."""

    command: str = ""
    """The command that repeats it."""

    where: str = ""
    folder: Path | None = None
    tokens: float | None = None
    flops: float | None = None
    test: dict[str, float] = field(default_factory=dict)
    test_step: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @functools.cached_property
    def tasks(self) -> list[str]:
        """The validated tasks, in the order in which they appear."""
        prefix = "valid/loss/"
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix))
        return [name.removeprefix(prefix) for name in names]

    def series(self, metric: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a metric: mean, worst, a task, or a name in metrics.jsonl."""
        points, tasks = [], self.tasks
        for row in self.rows:
            losses = {task: loss for task in tasks if (loss := row.get(f"valid/loss/{task}")) is not None}
            # A mean over fewer tasks than the run validates is not comparable with the others.
            if metric in ("mean", "worst"):
                value = criterion(losses, metric, {}) if losses and len(losses) == len(tasks) else None
            else:
                value = losses.get(metric, row.get(metric))
            if value is not None and math.isfinite(value):
                points.append((int(row["step"]), float(value)))
        return points

    def best(self, metric: str, higher: bool = False) -> float | None:
        """Returns the lowest (or highest) value of a metric, None where it was not logged."""
        return (max if higher else min)((value for _, value in self.series(metric)), default=None)


def read_run(folder: Path) -> Run:
    """Returns the run of a folder; what is missing or damaged there is left out."""
    try:
        config = yaml_file.load(folder / "config.yaml") or {}
    except (OSError, UserError):
        config = {}
    config = config if isinstance(config, dict) else {}
    record, summary = read_json(folder / "overrides.json"), read_json(folder / "summary.json")
    identity = identity_of(folder)
    if identity is not None and identity.version == VERSION:
        contents = with_contents(identity.tasks, record.text("data"), identity.fingerprints)
    else:  # of another version of mft: its fingerprints may be of something else
        tasks = read_json(folder / "plan.json").texts("tasks")
        contents = with_contents(tasks, record.text("data"), None)
    return Run(
        name=os.path.relpath(folder),
        values=flat(config) | contents,
        rows=run_folder.metric_rows(folder / "metrics.jsonl")[0],
        state=run_folder.state(folder),
        seconds=summary.number("seconds"),
        memory=summary.number("peak_memory_gib"),
        command=shlex.join(["mft", "train", *record.texts("overrides")]),
    )


def with_contents(tasks: Sequence[str], data: str, fingerprints: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the values of a run that stand for what it read.

    data: the fingerprint of its data; fingerprints: those of CONTENTS by name, None where they were not
    recorded.
    """
    values = {"task": f"[{','.join(tasks)}]"} if tasks else {}
    if data:
        values[DATA] = data[:8]
    if fingerprints is not None:
        values |= {f"{name}{FINGERPRINT}": fingerprints.get(name, "none")[:8] for name in CONTENTS}
    return values


def flat(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns {dotted key: text} of what can change a result, with `loss: coba` beside loss.tau."""
    values: dict[str, str] = dict(config.get("choices", {}))

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if key == "_target_" or under(path, NOT_COMPARED):
                continue
            if isinstance(value, Mapping):
                walk(value, f"{path}.")
            else:
                values[path] = f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')

    walk(config, "")
    skipped = ("tracking", "launch", "debug", "experiment")
    return {key: value for key, value in values.items() if key.split(".")[0] not in skipped}


def read_experiment(name: str, uri: str, extra: str = "mean") -> list[Run]:
    """Returns the runs of an MLflow experiment; extra: a metric to read besides the losses."""
    from mlflow.utils import get_results_from_paginated_fn

    from mft.tracking.params import safe_name
    from mft.tracking.store import client_for

    client = client_for(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        names = [e.name for e in client.search_experiments()]
        raise UserError(f"{name} is neither a folder nor an experiment of {uri}{nearest(name, names) or '.'}")
    runs = []

    def page(count: int, token: str | None) -> PagedList[MlflowRun]:
        return client.search_runs([experiment.experiment_id], max_results=count, page_token=token)

    for run in get_results_from_paginated_fn(page, PAGE):
        # A store keeps a history for each metric; a comparison needs them by step, as metrics.jsonl has them.
        rows: dict[int, dict[str, Any]] = {}
        for metric in run.data.metrics:
            if metric.startswith(("valid/", "train/weight/", "train/loss")) or metric == safe_name(extra):
                called = extra if metric == safe_name(extra) else metric
                for point in client.get_metric_history(run.info.run_id, metric):
                    rows.setdefault(point.step, {"step": point.step})[called] = point.value
        # MLflow has a flat config only, and times instead of a summary.
        start, end = run.info.start_time, run.info.end_time
        skipped = (*NOT_COMPARED, "tracking", "launch")
        params = run.data.params.items()
        values = {k: v for k, v in params if not k.endswith("_target_") and not under(k, skipped)}
        tags = run.data.tags
        command = f"mft train {tags.get('overrides', '')}"
        seconds = (end - start) / 1000 if end else None
        by_step = [rows[step] for step in sorted(rows)]
        result = Run(run.info.run_name, values, by_step, run.info.status.lower(), seconds, None, command)
        fingerprints = {kind: tags[tag] for kind in CONTENTS if (tag := fingerprint_tag(kind)) in tags}
        tasks = json.loads(tags["tasks"]) if "tasks" in tags else sorted(result.tasks)
        recorded = fingerprints if "tasks" in tags else None  # the version that tags them tags the tasks, too
        result.values |= with_contents(tasks, tags.get("data_fingerprint", ""), recorded)
        runs.append(result)
    return runs


def at(place: str, uri: str, metric: str = "mean") -> list[Run]:
    """Returns the runs of a folder, or of an MLflow experiment of that name.

    uri: of its store, else ./mlflow.db; metric: the one to compare by.
    """
    if Path(place).is_dir():
        return [read_run(path) for path in run_folder.runs_under(Path(place))]
    if not uri and not Path("mlflow.db").exists():
        raise UserError(
            f"{place} is not a folder, and there is no MLflow store here (mlflow.db) that could hold an "
            "experiment; --uri names another."
        )
    return read_experiment(place, uri or f"sqlite:///{Path('mlflow.db').resolve()}", metric)
