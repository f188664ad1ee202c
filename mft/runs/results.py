"""What runs say of themselves: read from their folders, or from an MLflow experiment."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mft import rundir
from mft.config import CANNOT_CHANGE_THE_RESULT, under
from mft.errors import UserError, nearest
from mft.metrics import criterion

NOT_COMPARED = tuple(key for key in CANNOT_CHANGE_THE_RESULT if "batch_size" not in key)


@dataclass
class Run:
    """What one run folder says. values: flat config with the option taken of every group; rows: metrics.jsonl."""

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

    def best(self, metric: str) -> float | None:
        """Returns the lowest value of a metric, None where it was not logged."""
        return min((value for _, value in self.series(metric)), default=None)


def read_run(folder: Path) -> Run:
    """Returns what a run folder says."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError):
        config = {}
    config = config if isinstance(config, dict) else {}
    known, summary = rundir.read_json(folder / "overrides.json"), rundir.read_json(folder / "summary.json")
    command = shlex.join(["mft", "train", *known.texts("overrides")])
    return Run(
        name=os.path.relpath(folder),
        values=flat(config),
        rows=rundir.rows_from(folder / "metrics.jsonl")[0],
        state=rundir.state(folder),
        seconds=summary.number("seconds"),
        memory=summary.number("peak_memory_gib"),
        command=command,
    )


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


def read_experiment(name: str, uri: str) -> list[Run]:
    """Returns the runs of an MLflow experiment, from the store alone."""
    from mft.tracking.store import client_for

    client = client_for(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        names = [e.name for e in client.search_experiments()]
        raise UserError(f"{name} is neither a folder nor an experiment of {uri}{nearest(name, names) or '.'}")
    runs = []
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        rows: dict[int, dict[str, Any]] = {}
        for metric in run.data.metrics:
            if metric.startswith(("valid/", "train/weight/", "train/loss")):
                for point in client.get_metric_history(run.info.run_id, metric):
                    rows.setdefault(point.step, {"step": point.step})[metric] = point.value
        start, end = run.info.start_time, run.info.end_time
        skipped = (*NOT_COMPARED, "tracking", "launch")
        params = run.data.params.items()
        values = {k: v for k, v in params if not k.endswith("_target_") and not under(k, skipped)}
        command = f"mft train {run.data.tags.get('overrides', '')}"
        seconds = (end - start) / 1000 if end else None
        by_step = [rows[step] for step in sorted(rows)]
        runs.append(Run(run.info.run_name, values, by_step, run.info.status.lower(), seconds, None, command))
    return runs


def at(place: str, uri: str) -> list[Run]:
    """Returns the runs of a folder, or of an MLflow experiment of that name (uri: of its store, else ./mlflow.db)."""
    if Path(place).is_dir():
        return [read_run(path) for path in rundir.runs_under(Path(place))]
    if not uri and not Path("mlflow.db").exists():
        raise UserError(
            f"{place} is no folder, and there is no MLflow store here (mlflow.db) to look for an experiment in."
        )
    return read_experiment(place, uri or f"sqlite:///{Path('mlflow.db').resolve()}")
