"""The account given before training: what became of the rows of each task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mft.data.duplicates import HELD_OUT, REPEATED
from mft.data.split import SPLITS
from mft.data.store import Store

if TYPE_CHECKING:
    from rich.table import Table


LEFT_OUT = ("rounds_left_out", "parts_left_out")


def as_json(stores: Sequence[Store], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns each task's report (see Store) with its lengths in tokens: mean, p50, p95, max."""
    return {name: store.report | {"length": _lengths(store)} for store, name in zip(stores, names, strict=True)}


def table(stores: Sequence[Store], names: Sequence[str]) -> Table:
    """Returns a line for each task and one for all of them; rows = kept + dropped in every line."""
    from rich.table import Table

    result = Table(title="data", title_justify="left")
    result.add_column("task")
    result.add_column("format")
    for header in ("rows", "kept", *SPLITS, "tokens", "trained", "%", "mean", "p50", "p95", "max"):
        result.add_column(header, justify="right")
    result.add_column("dropped and cut")
    for store, name in zip(stores, names, strict=True):
        length = _lengths(store)
        shown = (f"{length[k]:,.0f}" for k in ("mean", "p50", "p95", "max"))
        result.add_row(name, store.report["format"], *_cells(store.report), *shown, _lost(store.report))
    if len(stores) > 1:
        total = _total([store.report for store in stores])
        result.add_section()
        result.add_row(
            "all", "", *_cells(total), f"{total['tokens'] / max(1, total['samples']):,.0f}", "", "", "", _lost(total)
        )
    return result


def notes(stores: Sequence[Store], names: Sequence[str]) -> list[str]:
    """Returns what a table has no room for: duplicates, and rows that other programs would encode to other ids."""
    found = []
    for store, name in zip(stores, names, strict=True):
        kept = {
            reason: n
            for reason, n in store.report.get("duplicates", {}).items()
            if n and reason not in store.report["dropped"]
        }
        if kept:
            said = {REPEATED: "repeat an earlier row of the task", HELD_OUT: "train and are held out, too"}
            counted = ", ".join(f"{n:,} rows {said[reason]}" for reason, n in kept.items())
            found.append(f"{name}: {counted} (data.duplicates=drop leaves them out)")
        compared, differ = (store.report["one_string"][k] for k in ("compared", "differ"))
        if differ:
            found.append(
                f"{name}: apply_chat_template(tokenize=True) would give other ids than training for {differ:,} of "
                f"{compared:,} rows compared (docs/data.md says why; mft generate encodes as in training)"
            )
    return found


def write_dropped(path: Path, stores: Sequence[Store], names: Sequence[str]) -> None:
    """Writes every row that became no sample, one JSON object each: task, file, line, field, reason, problem, row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for store, name in zip(stores, names, strict=True):
            for dropped in store.dropped():
                file.write(json.dumps({"task": name} | dropped, ensure_ascii=False) + "\n")


def dropped_lines(stores: Sequence[Store], names: Sequence[str]) -> list[str]:
    """Returns a line for each dropped row that is known by name (the first 20 of a task)."""
    return [
        f"{name}: {d['where']}: {d['reason']}: {d['problem']}"
        for store, name in zip(stores, names, strict=True)
        for d in store.report["first_dropped"]
    ]


def _lengths(store: Store) -> dict[str, float]:
    if not len(store):
        return {"mean": 0.0, "p50": 0.0, "p95": 0.0, "max": 0.0}
    p50, p95, top = np.percentile(store.lengths_N, [50, 95, 100])
    return {"mean": float(store.lengths_N.mean()), "p50": float(p50), "p95": float(p95), "max": float(top)}


def _cells(report: dict[str, Any]) -> list[str]:
    tokens, trained = report["tokens"], report["trained_tokens"]
    counts = [report["rows"], report["kept"], *(report["splits"][s] for s in SPLITS), tokens, trained]
    return [*(f"{count:,}" for count in counts), f"{100 * trained / max(1, tokens):.0f}"]


def _lost(report: dict[str, Any]) -> str:
    parts = [f"{count:,} {reason}" for reason, count in report["dropped"].items() if count]
    if report["truncated"]:
        parts.append(f"{report['truncated']:,} cut")
    parts += [f"{report[k]:,} {k.replace('_', ' ')}" for k in LEFT_OUT if report[k]]
    return ", ".join(parts) or "-"


def _total(reports: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = ("rows", "kept", "samples", "tokens", "trained_tokens", "truncated", *LEFT_OUT)
    total: dict[str, Any] = {k: sum(r[k] for r in reports) for k in numbers}
    for k in ("splits", "dropped"):
        total[k] = {name: sum(r[k].get(name, 0) for r in reports) for name in reports[0][k]}
    return total
