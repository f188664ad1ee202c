"""A run read back, and how it is compared: its metrics, and its config as flat text."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mft.config.identity import CONTENTS
from mft.config.inputs import CANNOT_CHANGE_THE_RESULT, under
from mft.objective import criterion

NOT_COMPARED = (
    *(key for key in CANNOT_CHANGE_THE_RESULT if "batch_size" not in key),
    # Of these, the names of the tasks and the fingerprint of the data tell more.
    *("task.*.paths", "task.*.valid", "task.*.name"),
    *("tracking", "launch", "debug", "experiment"),
)

FINGERPRINT = " fingerprint"
"""Ends the keys of `Run.values` that are hashes of contents: the data's, and those of `identity.CONTENTS`."""

DATA = f"data{FINGERPRINT}"

OF_TASKS = "valid/loss/"
"""Begins the names of the validation losses of tasks."""


@dataclass
class Run:
    """What one run folder, or one run of an MLflow experiment, holds."""

    name: str
    """Short, of at most 20 characters; two runs may have the same. `where` tells them apart."""

    values: dict[str, str]
    """The flat config, with the option chosen of every group. `task` holds the names of all tasks in order;
    keys that end in FINGERPRINT hold hashes of contents, where they were recorded."""

    rows: list[dict[str, Any]]
    """metrics.jsonl; of a store the metrics that were asked for, by step."""

    state: str
    """running, finished, pruned, stopped, failed or killed."""

    seconds: float | None = None
    """How long it took; None where that was not recorded."""

    memory: float | None = None
    """Peak memory in GiB; None where that was not recorded."""

    command: str = ""
    """The line for a shell that repeats it in a new folder; "" where that was not recorded."""

    where: str = ""
    """The folder as seen from here, or experiment/run of a store."""

    folder: Path | None = None
    """Its run folder; None where that is not on this machine."""

    store: str = ""
    """Address of the MLflow store it was read from, without credentials; "" if read from its folder."""

    key: str = ""
    """The name that it has for itself in trackers; "" without one."""

    place: str = ""
    """The folder it wrote, on whichever machine, and its identity; "" where that was not recorded."""

    tokens: float | None = None
    """Processed without padding, over all ranks; None where that was not recorded."""

    flops: float | None = None
    """Of training, over all ranks; None where that was not recorded."""

    test: dict[str, float] = field(default_factory=dict)
    """Loss on the test rows of each task that has some, nats per token."""

    test_step: int | None = None
    """Step of the checkpoint that was tested."""

    facts: dict[str, Any] = field(default_factory=dict)
    """When, where and on what it ran, see `mft.runs.facts`."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Single values without a step: results of other tools, and of a store the last value of each metric."""

    @property
    def seed(self) -> int | None:
        """train.seed; None where it was not recorded."""
        text = self.values.get("train.seed", "")
        return int(text) if text.lstrip("-").isdigit() else None

    @functools.cached_property
    def tasks(self) -> list[str]:
        """The validated tasks, in the order in which they appear."""
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith(OF_TASKS))
        return [name.removeprefix(OF_TASKS) for name in names]

    def names(self) -> list[str]:
        """Returns the names of all its metrics."""
        names = dict.fromkeys([*(name for row in self.rows for name in row), *self.metrics])
        return [name for name in names if name != "step"]

    def series(self, metric: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a metric: mean, worst, a task, or the name of any metric.

        A value without a step stands at the last one.
        """
        points, tasks = [], self.tasks
        for row in self.rows:
            if metric in ("mean", "worst"):
                losses = {task: loss for task in tasks if (loss := row.get(OF_TASKS + task)) is not None}
                # A mean over fewer tasks than the run validates is not comparable with the others.
                value = criterion(losses, metric, {}) if losses and len(losses) == len(tasks) else None
            else:
                value = row.get(OF_TASKS + metric if metric in tasks else metric)
            if isinstance(value, int | float) and math.isfinite(value):
                points.append((int(row["step"]), float(value)))
        alone = self.metrics.get(metric, math.nan)
        if not points and math.isfinite(alone):
            points = [(max((int(row["step"]) for row in self.rows), default=0), alone)]
        return points

    def best(self, metric: str, higher: bool = False) -> float | None:
        """Returns the lowest (or highest) value of a metric, None where it was not logged."""
        return (max if higher else min)((value for _, value in self.series(metric)), default=None)


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
    values: dict[str, str] = {key: str(option) for key, option in (config.get("choices") or {}).items()}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                values[f"{prefix}{key}"] = value if isinstance(value, str) else _text(value)

    walk(config, "")
    return compared(values)


def compared(values: Mapping[str, str]) -> dict[str, str]:
    """Returns the values of a flat config that can change a result."""
    return {key: value for key, value in values.items() if _is_compared(key)}


@functools.cache
def _is_compared(key: str) -> bool:  # asked for the same hundred keys of a thousand runs
    return not key.endswith("_target_") and not under(key, NOT_COMPARED)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
