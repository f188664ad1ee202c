"""The account given before training: what became of the rows of each task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mft.console.tables import table
from mft.data.cache.store import Store
from mft.data.cache.writer import CUTS
from mft.data.duplicates import HELD_OUT, REPEATED
from mft.data.split import SPLITS
from mft.data.unread import SAYS_LOSS, split_labels
from mft.errors import shortened

if TYPE_CHECKING:
    from rich.table import Table


def as_json(stores: Sequence[Store], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns each task's report (see Store), lengths in tokens (mean, p50, p95, max), files held out by
    name."""
    return {
        name: store.report | {"length": _lengths(store), "held_out_files": store.held_out_files()}
        for store, name in zip(stores, names, strict=True)
    }


def tables(stores: Sequence[Store], names: Sequence[str]) -> list[Table]:
    """Returns the account in rows and in tokens, each with a line for each task and one for all of them.

    rows = kept + dropped in every line. Both fit into 80 columns: two tables, and names and reasons go on
    below.
    """
    reports = [store.report for store in stores]
    splits = [name for name in SPLITS if name != "test" or any(report["splits"][name] for report in reports)]
    in_rows, in_tokens = [], []
    accounts = list(zip(names, reports, map(_lengths, stores), strict=True))
    if len(stores) > 1:
        total = _total(reports)
        accounts.append(("all", total, {"mean": total["tokens"] / max(1, total["samples"])}))
    for name, report, length in accounts:
        counts = (report["rows"], report["kept"], *(report["splits"][split] for split in splits))
        in_rows.append([name, report["format"], *(f"{count:,}" for count in counts), _lost(report)])
        percent = f"{100 * report['trained_tokens'] / max(1, report['tokens']):.0f}"
        lengths = (f"{length[key]:,.0f}" if key in length else "" for key in ("mean", "p50", "p95", "max"))
        in_tokens.append([name, f"{report['tokens']:,}", f"{report['trained_tokens']:,}", percent, *lengths])
    counted, measured = ["rows", "kept", *splits], ["tokens", "trained", "%", "mean", "p50", "p95", "max"]
    below = [rows.pop() if len(stores) > 1 else None for rows in (in_rows, in_tokens)]
    return [
        table("rows", ["task", "format", *counted, "dropped and cut"], in_rows, counted, total=below[0]),
        table("tokens", ["task", *measured], in_tokens, measured, total=below[1]),
    ]


def notes(stores: Sequence[Store], names: Sequence[str]) -> list[str]:
    """Returns what a table has no room for: fields that are not read, files held out by name, duplicates, and
    rows that other programs would encode to other ids."""
    found = unread_notes(stores, names)
    for store, name in zip(stores, names, strict=True):
        if files := store.held_out_files():
            listed = [
                f"{_printable(Path(f['file']).name)} ({f['split']}, {f['rows']:,} rows)" for f in files[:6]
            ]
            more = f" and {len(files) - 6} more (data.json)" if len(files) > 6 else ""
            found.append(f"{name}: held out, never trained: {', '.join(listed)}{more}")
        kept = {
            reason: n
            for reason, n in store.report.get("duplicates", {}).items()
            if n and reason not in store.report["dropped"]
        }
        if kept:
            said = {REPEATED: "repeat an earlier row of the task", HELD_OUT: "train and are held out, too"}
            counted = ", ".join(f"{n:,} rows {said[reason]}" for reason, n in kept.items())
            found.append(f"{name}: {counted} (data.duplicates=drop leaves them out)")
        if n := store.report["empty_thoughts"]:
            found.append(
                f"{name}: the template puts an empty thought before {n:,} answers; it carries no loss"
            )
    return found


def unread_notes(stores: Sequence[Store], names: Sequence[str]) -> list[str]:
    """Returns a line for each task with fields that its format does not read, and one for the labels of all
    tasks."""
    found: list[str] = []
    labels: Counter[str] = Counter()
    for store, name in zip(stores, names, strict=True):
        counts = store.report["unread"]
        if counts is None:
            found.append(
                f"{name}: its format does not say which fields of a row it leaves unread (Format.unread)"
            )
            continue
        lessons, named = split_labels(counts)
        labels.update(named)
        if lessons:
            found.append(f"{name}: not read: {_listed(lessons)}")
        if loss := [field for field in lessons if field in SAYS_LOSS]:
            found.append(
                f"{name}: {', '.join(loss)} may say what carries loss, but is not read there: all answers "
                f"of these "
                'rows are trained unless a turn says "train": false'
            )
        if n := store.report["answers_without_loss"]:
            found.append(
                f"{name}: {n:,} answers carry no loss, as their rows ask (train, weight or loss_mask)"
            )
    if labels:
        found.append(f"labels that are not read: {_listed(dict(labels.most_common()))}")
    return found


def _listed(counts: dict[str, int], most: int = 12) -> str:
    shown = [f"{_printable(field)} ({n:,} rows)" for field, n in list(counts.items())[:most]]
    more = [f"{len(counts) - most} more in data.json"] if len(counts) > most else []
    return ", ".join(shown + more)


def _printable(field: str) -> str:
    return field if field.isprintable() and len(field) <= 80 else shortened(field)


def write_dropped(path: Path, stores: Sequence[Store], names: Sequence[str]) -> None:
    """Writes every row that became no sample, one JSON object each: task, file, line, field, reason, problem,
    row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for store, name in zip(stores, names, strict=True):
            for dropped in store.dropped():
                file.write(json.dumps({"task": name} | dropped, ensure_ascii=False) + "\n")


def _lengths(store: Store) -> dict[str, float]:
    if not len(store):
        return {"mean": 0.0, "p50": 0.0, "p95": 0.0, "max": 0.0}
    p50, p95, top = np.percentile(store.lengths_N, [50, 95, 100])
    return {"mean": float(store.lengths_N.mean()), "p50": float(p50), "p95": float(p95), "max": float(top)}


def _lost(report: dict[str, Any]) -> str:
    parts = [f"{count:,} {reason}" for reason, count in report["dropped"].items() if count]
    parts += [f"{report[k]:,} {k.replace('_', ' ')}" for k in CUTS if report[k]]
    return ", ".join(parts) or "-"


def _total(reports: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = ("rows", "kept", "samples", "tokens", "trained_tokens", *CUTS)
    total: dict[str, Any] = {k: sum(r[k] for r in reports) for k in numbers}
    for k in ("splits", "dropped"):
        total[k] = {name: sum(r[k].get(name, 0) for r in reports) for name in reports[0][k]}
    return total | {"format": ""}
