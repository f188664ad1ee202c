"""compare.json: a comparison for other programs. docs/comparison.md describes it."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mft import __version__
from mft.comparison.baseline import SingleTasks
from mft.comparison.compare import Comparison
from mft.comparison.effects import effects
from mft.comparison.multitask import MultiTask, losses_of, multitask
from mft.comparison.notes import notes
from mft.comparison.settings import Judged, Metric, Setting
from mft.comparison.statistics import CONFIDENCE, Difference
from mft.comparison.verdicts import sentence, verdict
from mft.files.json_file import write_json

FILE = "compare.json"

VERSION = 1
"""Raised when a field is removed or changes its meaning; new fields may come at any time."""


def write(comparison: Comparison, path: Path) -> Path:
    """Writes the file; returns it."""
    write_json(path, content(comparison))
    return path


def content(comparison: Comparison) -> dict[str, Any]:
    """Returns what the file holds: plain values, null where something is not known."""
    of_keys, unexplained = effects(comparison)
    reference, winner = comparison.reference, comparison.winner
    accounts = multitask(comparison)
    known: dict[str, Any] = _plain(
        {
            "format": "mft-compare",
            "version": VERSION,
            "mft": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "title": comparison.title,
            "metrics": [asdict(metric) for metric in comparison.metrics],
            "confidence": CONFIDENCE,
            "tasks": comparison.tasks,
            "other_tasks": comparison.other_tasks,
            "paired_by": comparison.pairing,
            "baseline": comparison.baseline or None,
            "reference": reference.title if reference else None,
            "winner": winner.title if winner else None,
            "sentence": sentence(comparison),
            "notes": notes(comparison),
            "single_tasks": _single_tasks(comparison),
            "settings": [_setting(comparison, i, account) for i, account in enumerate(accounts)],
            "before_training": comparison.base,
            "effects": [asdict(effect) for effect in of_keys],
            "unexplained": unexplained,
            "runs": [_run(comparison, s, one) for s in comparison.every_setting for one in s.judged],
        }
    )
    return known


def _single_tasks(comparison: Comparison) -> dict[str, Any] | None:
    """Returns what the single-task runs reached where they are the baseline, else None."""
    reference, metrics = comparison.reference, comparison.metrics
    if not isinstance(reference, SingleTasks):
        return None
    return {
        "mean": {metric.name: reference.mean(metric) for metric in metrics},
        "spread": {metric.name: reference.spread(metric) for metric in metrics},
        "losses": losses_of(reference, comparison.tasks),
        "seconds": reference.cost("seconds"),
        "tokens": reference.cost("tokens"),
        "flops": reference.cost("flops"),
        "memory_gib": reference.cost("memory"),
    }


def _setting(comparison: Comparison, place: int, account: MultiTask) -> dict[str, Any]:
    setting, metrics = comparison.settings[place], comparison.metrics
    seeds = [(metric.name, setting.values(metric)) for metric in metrics]
    return {
        "rank": place + 1,
        "name": setting.label,
        "title": setting.title,
        "keys": setting.keys,
        "verdict": verdict(comparison, setting),
        "seeds": {name: {" ".join(block): value for block, value in of.items()} for name, of in seeds},
        "mean": {metric.name: setting.mean(metric) for metric in metrics},
        "spread": {metric.name: setting.spread(metric) for metric in metrics},
        "worst": setting.mean(Metric("worst")),
        "losses": losses_of(setting, comparison.tasks),
        "test": setting.test(),
        "difference": _difference(comparison.differences[place]),
        "by_task": {task: _difference(found) for task, found in comparison.by_task[place].items()},
        **asdict(account),
        "seconds": setting.cost("seconds"),
        "tokens": setting.cost("tokens"),
        "flops": setting.cost("flops"),
        "memory_gib": setting.cost("memory"),
    }


def _run(comparison: Comparison, setting: Setting, one: Judged) -> dict[str, Any]:
    run = one.run
    return {
        "name": run.name,
        "where": run.where,
        "setting": setting.title,
        "seed": run.seed,
        "state": str(run.state),
        "step": one.step,
        "values": {metric.name: one.value(metric) for metric in comparison.metrics},
        "losses": {} if one.step is None else one.losses.get(one.step, {}),
        "test": run.test,
        "test_step": run.test_step,
        "seconds": run.seconds,
        "tokens": run.tokens,
        "flops": run.flops,
        "memory_gib": run.memory,
        "facts": run.facts,
        "command": run.command,
    }


def _difference(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else asdict(difference) | {"told_apart": difference.told_apart}


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it: lists for tuples, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
