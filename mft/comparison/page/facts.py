"""What the runs stand on: model, data, machine, versions; what of it differs is listed, not hidden."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import mft
from mft.comparison.compare import Comparison
from mft.comparison.page.table import Cell, Head, Table
from mft.comparison.settings import SEED
from mft.runs.results import DATA, FINGERPRINT, Run

MOST_NAMED = 6
"""Values of a fact that are listed."""

FINGERPRINTS = ("base model", "tokenizer", "code", "adapter", "template")


@dataclass
class Facts:
    """runs: their number; common: (name, value) of all; differing: (name, [(value, number of runs)])."""

    runs: int
    common: list[tuple[str, str]]
    differing: list[tuple[str, list[tuple[str, int]]]] = field(default_factory=list)
    data: Table | None = None


def facts(comparison: Comparison) -> Facts:
    """Returns the facts of all runs of a comparison, those of the baseline as well."""
    runs = comparison.every_run
    ranked = len(comparison.runs)
    beside = f", and {len(runs) - ranked:,} of the baseline" if len(runs) > ranked else ""
    result = Facts(len(runs), [("runs", f"{ranked:,} in {len(comparison.settings):,} settings{beside}")])
    started = sorted(str(run.facts["started"]) for run in runs if run.facts.get("started"))
    if started:
        first, last = started[0][:16], started[-1][:16]
        result.common.append(("started", first if first == last else f"{first} to {last}"))
    of_runs = [_of_run(run) for run in runs]
    for name in dict.fromkeys(name for of_run in of_runs for name in of_run):
        counts = Counter(of_run.get(name, "not recorded") for of_run in of_runs)
        if len(counts) == 1:
            result.common.append((name, next(iter(counts))))
        elif name == SEED:
            result.common.append(("seeds", _listed(counts)))
        else:
            values = counts.most_common(MOST_NAMED)
            rest = sum(counts.values()) - sum(count for _, count in values)
            more = [(f"{len(counts) - MOST_NAMED} other values", rest)] if rest else []
            result.differing.append((name, [*values, *more]))
    now = datetime.now().astimezone().isoformat(timespec="minutes")
    result.common.append(("report", f"{now}, mft {mft.__version__}"))
    result.data = _data(runs)
    return result


def _of_run(run: Run) -> dict[str, str]:
    """Returns the facts of a run as text, without those that have a place of their own."""
    aside = ("data", "started")
    found = {name: str(value) for name, value in run.facts.items() if name not in aside}
    if "model" not in found and (model := run.values.get("model.path") or run.values.get("model")):
        found["model"] = model
    for name in FINGERPRINTS:
        value = run.values.get(f"{name}{FINGERPRINT}", "none")
        if value not in ("none", "") and name not in found:
            found[f"{name}{FINGERPRINT}"] = value
    if (data := run.values.get(DATA)) and DATA not in found:
        found[DATA] = data
    if "steps" not in found and run.rows:
        found["steps"] = f"{run.rows[-1].get('step', 0):,}"
    if SEED in run.values:
        found[SEED] = run.values[SEED]
    return found


def _listed(counts: Mapping[str, int]) -> str:
    values = sorted(counts, key=lambda value: (len(value), value))
    more = f" and {len(values) - 2 * MOST_NAMED} more" if len(values) > 2 * MOST_NAMED else ""
    return ", ".join(values[: 2 * MOST_NAMED]) + more


def _data(runs: Sequence[Run]) -> Table | None:
    """Returns the samples of every task by split; several numbers where runs differ."""
    sizes: dict[str, dict[str, set[int]]] = {}
    for run in runs:
        tasks: Any = run.facts.get("data")
        for task, of_task in (tasks if isinstance(tasks, Mapping) else {}).items():
            for split, count in (of_task if isinstance(of_task, Mapping) else {}).items():
                if isinstance(count, int | float):
                    sizes.setdefault(str(task), {}).setdefault(str(split), set()).add(int(count))
    if not sizes:
        return None
    splits = list(dict.fromkeys(split for of_task in sizes.values() for split in of_task))
    rows = []
    for task, of_task in sizes.items():
        counts = [sorted(of_task.get(split, ())) for split in splits]
        cells = [Cell(_range(values), float(values[0]) if values else None) for values in counts]
        rows.append([Cell(task), *cells])
    return Table(heads=[Head("task", "", False), *(Head(split) for split in splits)], rows=rows)


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return ""
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
