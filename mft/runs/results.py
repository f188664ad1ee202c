"""What runs say of themselves: read from their folders, or from an MLflow experiment."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft import run_folder
from mft.config import yaml_file
from mft.config.identity import CONTENTS, VERSION, identity_of
from mft.config.inputs import CANNOT_CHANGE_THE_RESULT, under
from mft.errors import UserError, nearest
from mft.files.json_file import read_json
from mft.objective import criterion
from mft.training.provenance import fingerprint_tag

NOT_COMPARED = (
    *(key for key in CANNOT_CHANGE_THE_RESULT if "batch_size" not in key),
    *("task.*.paths", "task.*.valid", "task.*.name"),  # the names of the tasks and the data's fingerprint tell more
)

FINGERPRINT = " fingerprint"
"""Ends the keys of `Run.values` that are hashes of contents: the data's, and those of `identity.CONTENTS`."""

DATA = f"data{FINGERPRINT}"

PAGE = 1000
"""Runs asked of an MLflow store at once."""


@dataclass
class Run:
    """What one run folder says.

    values: flat config with the option taken of every group; `task` are the names of all tasks in order, keys that end
    in FINGERPRINT are hashes of contents, where they are known; rows: metrics.jsonl.
    """

    name: str
    values: dict[str, str]
    rows: list[dict[str, Any]]
    state: str
    seconds: float | None = None
    memory: float | None = None
    command: str = ""

    @property
    def tasks(self) -> list[str]:
        """The validated tasks, in the order in which they appear."""
        prefix = "valid/loss/"
        return list(dict.fromkeys(k.removeprefix(prefix) for row in self.rows for k in row if k.startswith(prefix)))

    def series(self, metric: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a metric: mean, worst, a task (validation losses), or a name in metrics.jsonl."""
        found = []
        for row in self.rows:
            losses = {t: row[f"valid/loss/{t}"] for t in self.tasks if row.get(f"valid/loss/{t}") is not None}
            if metric in ("mean", "worst"):
                value = criterion(losses, metric, {}) if losses and len(losses) == len(self.tasks) else None
            else:
                value = losses.get(metric, row.get(metric))
            if value is not None and math.isfinite(value):
                found.append((int(row["step"]), float(value)))
        return found

    def best(self, metric: str, higher: bool = False) -> float | None:
        """Returns the lowest (or highest) value of a metric, None where it was not logged."""
        return (max if higher else min)((value for _, value in self.series(metric)), default=None)


def read_run(folder: Path) -> Run:
    """Returns what a run folder says."""
    try:
        config = yaml_file.load(folder / "config.yaml") or {}
    except (OSError, UserError):
        config = {}
    config = config if isinstance(config, dict) else {}
    known, summary = read_json(folder / "overrides.json"), read_json(folder / "summary.json")
    command = shlex.join(["mft", "train", *known.texts("overrides")])
    return Run(
        name=os.path.relpath(folder),
        values=flat(config) | _contents(folder, known),
        rows=run_folder.rows_from(folder / "metrics.jsonl")[0],
        state=run_folder.state(folder),
        seconds=summary.number("seconds"),
        memory=summary.number("peak_memory_gib"),
        command=command,
    )


def _contents(folder: Path, known: Mapping[str, Any]) -> dict[str, str]:
    """Returns `task` and the fingerprints of a run folder; known: its overrides.json."""
    found = identity_of(folder)
    if found is None or found.version != VERSION:
        return with_contents(read_json(folder / "plan.json").get("tasks", []), known.get("data", ""), None)
    return with_contents(found.tasks, known.get("data", ""), found.fingerprints)


def with_contents(tasks: Sequence[str], data: str, fingerprints: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the values of a run that stand for what it has read; fingerprints: None = unknown, besides the data's."""
    values = {"task": f"[{','.join(tasks)}]"} if tasks else {}
    if data:
        values[DATA] = data[:8]
    if fingerprints is not None:
        values |= {f"{name}{FINGERPRINT}": fingerprints.get(name, "none")[:8] for name in CONTENTS}
    return values


def flat(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns {dotted key: text} of what can change a result; `loss: coba` stands beside loss.tau and so on."""
    found: dict[str, str] = dict(config.get("choices", {}))

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if key == "_target_" or under(path, NOT_COMPARED):
                continue
            if isinstance(value, Mapping):
                walk(value, f"{path}.")
            else:
                found[path] = f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')

    walk(config, "")
    return {k: v for k, v in found.items() if k.split(".")[0] not in ("tracking", "launch", "debug", "experiment")}


def read_experiment(name: str, uri: str, asked: str = "mean") -> list[Run]:
    """Returns the runs of an MLflow experiment, from the store alone; asked: a metric to read besides the losses."""
    from mft.tracking.params import safe_name
    from mft.tracking.store import client_for

    client = client_for(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        names = [e.name for e in client.search_experiments()]
        raise UserError(f"{name} is neither a folder nor an experiment of {uri}{nearest(name, names) or '.'}")
    runs = []
    for run in _all_runs(client, experiment.experiment_id):
        rows: dict[int, dict[str, Any]] = {}
        for metric in run.data.metrics:
            if metric.startswith(("valid/", "train/weight/", "train/loss")) or metric == safe_name(asked):
                called = asked if metric == safe_name(asked) else metric
                for point in client.get_metric_history(run.info.run_id, metric):
                    rows.setdefault(point.step, {"step": point.step})[called] = point.value
        start, end = run.info.start_time, run.info.end_time
        skipped = (*NOT_COMPARED, "tracking", "launch")
        params = run.data.params.items()
        values = {k: v for k, v in params if not k.endswith("_target_") and not under(k, skipped)}
        tags = run.data.tags
        command = f"mft train {tags.get('overrides', '')}"
        seconds = (end - start) / 1000 if end else None
        by_step = [rows[step] for step in sorted(rows)]
        found = Run(run.info.run_name, values, by_step, run.info.status.lower(), seconds, None, command)
        known = {kind: tags[tag] for kind in CONTENTS if (tag := fingerprint_tag(kind)) in tags}
        tasks = json.loads(tags["tasks"]) if "tasks" in tags else sorted(found.tasks)
        found.values |= with_contents(tasks, tags.get("data_fingerprint", ""), known if "tasks" in tags else None)
        runs.append(found)
    return runs


def _all_runs(client: Any, experiment: str) -> Iterator[Any]:
    """Yields the runs of an experiment, page by page: a store gives so many at once."""
    token = None
    while True:
        page = client.search_runs([experiment], max_results=PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def at(place: str, uri: str, asked: str = "mean") -> list[Run]:
    """Returns the runs of a folder, or of an MLflow experiment of that name.

    uri: of its store, else ./mlflow.db; asked: the metric to compare by.
    """
    if Path(place).is_dir():
        return [read_run(path) for path in run_folder.runs_under(Path(place))]
    if not uri and not Path("mlflow.db").exists():
        raise UserError(
            f"{place} is no folder, and there is no MLflow store here (mlflow.db) to look for an experiment in."
        )
    return read_experiment(place, uri or f"sqlite:///{Path('mlflow.db').resolve()}", asked)
