"""What a user sees of the data: the counts of every task's rows before training, and samples as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mft.console.tables import table
from mft.data.cache.store import Store
from mft.data.cache.writer import CUTS
from mft.data.duplicates import HELD_OUT, REPEATED
from mft.data.row_fields import LABEL, says_loss
from mft.data.split import SPLITS
from mft.errors import shortened

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

FIELDS_NAMED, FILES_NAMED = 12, 6
"""How many unread fields and held-out files a note names; data.json has all of them."""


def as_json(stores: Sequence[Store], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns each task's report (see Store), its sizes by split, lengths in tokens, and the files held out
    by name."""
    return {
        name: store.report
        | {"sizes": _sizes(store), "length": _lengths(store), "held_out_files": store.held_out_files()}
        for store, name in zip(stores, names, strict=True)
    }


def tables(stores: Sequence[Store], names: Sequence[str]) -> list[Table]:
    """Returns the account in rows and in tokens, each with a line for each task and one for all of them.

    rows = kept + dropped in every line. Two tables, in which names and reasons wrap, fit into 80 columns.
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
    below = [lines.pop() if len(stores) > 1 else None for lines in (in_rows, in_tokens)]
    return [
        table("rows", ["task", "format", *counted, "dropped and cut"], in_rows, counted, total=below[0]),
        table("tokens", ["task", *measured], in_tokens, measured, total=below[1]),
    ]


def notes(stores: Sequence[Store], names: Sequence[str]) -> list[str]:
    """Returns what a table has no room for: fields that are not read, files held out by name, duplicates, and
    rows that other programs would encode to other ids."""
    lines = unread_notes(stores, names)
    for store, name in zip(stores, names, strict=True):
        if files := store.held_out_files():
            named = [
                f"{_printable(Path(str(f['file'])).name)} ({f['split']}, {f['rows']:,} rows)" for f in files
            ]
            lines.append(f"{name}: held out, never trained: {_listed(named, FILES_NAMED)}")
        what = {REPEATED: "repeat an earlier row of the task", HELD_OUT: "train and are held out, too"}
        kept = []
        for reason, count in store.report.get("duplicates", {}).items():
            if count and reason not in store.report["dropped"]:
                kept.append(f"{count:,} rows {what[reason]}")
        if kept:
            lines.append(f"{name}: {', '.join(kept)} (data.duplicates=drop leaves them out)")
        if n := store.report["empty_thoughts"]:
            lines.append(f"{name}: the template puts an empty thought before {n:,} answers, without loss")
    return lines


def unread_notes(stores: Sequence[Store], names: Sequence[str]) -> list[str]:
    """Returns a line for each task whose format does not read some fields, and one for the labels of all."""
    lines: list[str] = []
    labels: Counter[str] = Counter()
    for store, name in zip(stores, names, strict=True):
        counts = store.report["unread"]
        if counts is None:
            lines.append(f"{name}: its format does not say which fields it leaves unread (Format.unread)")
            continue
        labels.update({field: n for field, n in counts.items() if LABEL.fullmatch(field)})
        lessons = {field: n for field, n in counts.items() if field not in labels}
        if lessons:
            lines.append(f"{name}: not read: {_fields(lessons)}")
        if loss := [field for field in _ordered(lessons) if says_loss(field)]:
            lines.append(
                f"{name}: {', '.join(loss)} may say what carries loss, but is not read there: all answers of "
                'these rows are trained unless a turn says "train": false'
            )
        if n := store.report["answers_without_loss"]:
            lines.append(f"{name}: {n:,} answers carry no loss, by their train, weight or loss_mask")
    if labels:
        lines.append(f"labels that are not read: {_fields(labels)}")
    return lines


def _ordered(counts: Mapping[str, int]) -> list[str]:
    """Returns fields with the most frequent first."""
    return sorted(counts, key=lambda field: (-counts[field], field))


def _fields(counts: Mapping[str, int]) -> str:
    named = [f"{_printable(field)} ({counts[field]:,} rows)" for field in _ordered(counts)]
    return _listed(named, FIELDS_NAMED)


def _listed(items: Sequence[str], most: int) -> str:
    more = [f"{len(items) - most} more in data.json"] if len(items) > most else []
    return ", ".join([*items[:most], *more])


def _printable(name: str) -> str:
    return name if name.isprintable() and len(name) <= 80 else shortened(name)


def write_dropped(path: Path, stores: Sequence[Store], names: Sequence[str]) -> None:
    """Writes every row without a sample as a JSON object: task, file, line, field, reason, problem, row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, for which a row may have been dropped, has no UTF-8; its escape is JSON.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for store, name in zip(stores, names, strict=True):
            for dropped in store.dropped():
                file.write(json.dumps({"task": name} | dropped, ensure_ascii=False) + "\n")


def _sizes(store: Store) -> dict[str, dict[str, int]]:
    """Returns rows, samples, tokens and trained tokens of each split."""
    summed = {"rows": store.begins_N(), "tokens": store.lengths_N, "trained_tokens": store.trained_N}
    sizes = {}
    for index, split in enumerate(SPLITS):
        of_split_N = store.split_N == index
        sums = {name: int(count_N[of_split_N].sum(dtype=np.int64)) for name, count_N in summed.items()}
        sizes[split] = {"samples": int(of_split_N.sum())} | sums
    return sizes


def _lengths(store: Store) -> dict[str, float]:
    if not len(store):
        return dict.fromkeys(("mean", "p50", "p95", "max"), 0.0)
    p50, p95, longest = np.percentile(store.lengths_N, [50, 95, 100]).tolist()
    return {"mean": float(store.lengths_N.mean()), "p50": p50, "p95": p95, "max": longest}


def _lost(report: Mapping[str, Any]) -> str:
    parts = [f"{count:,} {reason}" for reason, count in report["dropped"].items() if count]
    parts += [f"{report[k]:,} {k.replace('_', ' ')}" for k in CUTS if report[k]]
    return ", ".join(parts) or "-"


def _total(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    numbers = ("rows", "kept", "samples", "tokens", "trained_tokens", *CUTS)
    total: dict[str, Any] = {k: sum(r[k] for r in reports) for k in numbers}
    for k in ("splits", "dropped"):
        total[k] = {name: sum(r[k].get(name, 0) for r in reports) for name in reports[0][k]}
    return total | {"format": ""}


def spans(
    ids_S: np.ndarray, trained_S: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Returns the text of a sample in stretches, each with whether its tokens carry loss.

    The first token never does: nothing comes before it to predict it.
    """
    trained_S = np.array(trained_S)  # a copy
    trained_S[:1] = False
    borders = [0, *(np.flatnonzero(np.diff(trained_S)) + 1).tolist(), len(ids_S)]
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    stretches: list[tuple[str, bool]] = []
    before = ""
    for start, stop in pairwise(borders):
        # What decoding gains by the stretch: alone, sentencepiece tokenizers leave out a blank at its start.
        text = str(decode(ids_S[:stop].tolist()))
        # Bytes of one character on both sides of a border decode to another character than alone.
        continues = text.startswith(before)
        stretch = text.removeprefix(before) if continues else str(decode(ids_S[start:stop].tolist()))
        stretches.append((stretch, bool(trained_S[start])))
        before = text
    return stretches
