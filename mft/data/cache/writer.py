"""The files of a token cache in the making, and the account of its rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mft.data.cache import blocks
from mft.data.readers import row_text
from mft.data.settings import DataSettings
from mft.data.split import SPLITS

if TYPE_CHECKING:
    from mft.data.tokenize import FittedRow

VERSION = 6
"""Part of the fingerprint of every store: a change of layout, splitting or encoding raises it."""

CUTS = ("truncated", "rounds_left_out", "parts_left_out")
"""What a row that is kept may have lost: it was truncated (0 or 1), rounds too long for any sample, and parts
in which nothing carries loss."""
NOTHING = dict.fromkeys(CUTS, 0)

COLUMNS = {
    "offsets": "int64",
    "trained_counts": "int32",
    "split": "uint8",
    "file": "int32",
    "line": "int64",
    "digest": "uint64",
    **dict.fromkeys(CUTS, "int32"),
}
"""Per-sample columns, one raw file each (`offsets.bin`, ...), beside `ids.bin` and `trained.bin`, which hold
tokens. offsets has one entry more than there are samples: sample i is tokens offsets[i] to offsets[i + 1].
digest: of its row's conversation; what the row lost stands with its first sample, 0 with the others."""

BAD_ROW, TOO_LONG, UNTRAINED = "bad row", "too long", "no trained token"
REASONS = (BAD_ROW, TOO_LONG, UNTRAINED)

DROPPED = "dropped.jsonl"
"""The rows that did not become samples, one object each: file (its number), line, reason, field, problem,
row."""

META = "meta.json"
"""The account of a store, with its own checksum and those of the files."""

DROPPED_NAMED = 20  # of them are in the report, too
UNREAD_NAMED, OTHERS = 200, "other fields"
"""How many fields that no format reads are counted by their names, and as what the others are."""

Place = tuple[int, int]
"""Number of the file in `Task.files()`, line."""


class Writer:
    """Files of a store in the making. `add` and `drop` account for every row; `finish` writes meta.json,
    last."""

    def __init__(self, folder: Path, vocab_size: int, settings: DataSettings):
        self.folder, self.settings = folder, settings
        # uint16 halves file and page cache for the usual small vocabularies
        self.dtypes = COLUMNS | {"ids": "uint16" if vocab_size < 65536 else "uint32", "trained": "uint8"}
        self.dropped: Counter[str] = Counter()
        self.named: list[dict[str, Any]] = []
        self.splits: Counter[int] = Counter()
        self.kept = self.samples = self.tokens = self.trained_tokens = 0
        self.cuts = dict.fromkeys(CUTS, 0)
        self.unread: Counter[str] = Counter()
        self.declared = True  # whether the format says which fields it reads
        self.answers_without_loss = self.empty_thoughts = 0
        self.pending: dict[str, list[Any]] = {name: [] for name in self.dtypes}

    def __enter__(self) -> Writer:
        self.stack = ExitStack()
        self.files = {n: self.stack.enter_context((self.folder / f"{n}.bin").open("wb")) for n in self.dtypes}
        self.refused = self.stack.enter_context((self.folder / DROPPED).open("w", encoding="utf-8"))
        self.files["offsets"].write(np.zeros(1, self.dtypes["offsets"]).tobytes())
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    @property
    def rows(self) -> int:
        """Rows accounted for so far."""
        return self.kept + self.dropped.total()

    def drop(self, place: Place, row: Any, reason: str, problem: str, field: str = "") -> None:
        """Counts a row that does not become a sample, and writes it down."""
        self.dropped[reason] += 1
        about = {"file": place[0], "line": place[1], "reason": reason, "field": field, "problem": problem}
        if len(self.named) < DROPPED_NAMED:
            self.named.append(about)
        self.refused.write(json.dumps(about | {"row": row_text(row)}) + "\n")

    def leave_unread(self, fields: Iterable[str] | None) -> None:
        """Counts the fields of a row that its format does not read; None: it does not say."""
        if fields is None:
            self.declared = False
            return
        for name in fields:
            # rows may have keys of their own each, e.g. their number, which are not worth the memory
            known = name in self.unread or len(self.unread) < UNREAD_NAMED
            self.unread[name if known else OTHERS] += 1

    def add(self, place: Place, row: Any, samples: FittedRow, length: int, split: int, digest: int) -> None:
        """Takes the samples of one row, or drops the row where none is left or none would teach anything.

        samples: what `fitted` made of the row; length: its tokens before; digest: of its conversation.
        """
        limit = self.settings.seq_length
        if not samples.parts:
            return self.drop(place, row, TOO_LONG, f"{length} tokens, data.seq_length is {limit}")
        counted = [(ids_S, trained_S, int(trained_S[1:].sum())) for ids_S, trained_S in samples.parts]
        taught = [part for part in counted if part[2]]  # nothing predicts a first token, so it does not count
        if not taught:
            cut = f" left after cutting {length} tokens to data.seq_length {limit}" if length > limit else ""
            return self.drop(place, row, UNTRAINED, f"no token that carries loss{cut}")
        self.kept += 1
        truncated = int(length > limit >= max(len(ids_S) for ids_S, _ in samples.parts))
        lost = dict(zip(CUTS, (truncated, samples.dropped_rounds, len(counted) - len(taught)), strict=True))
        for name, count in lost.items():
            self.cuts[name] += count
        about = {"file": place[0], "line": place[1], "split": split, "digest": digest}
        for ids_S, trained_S, trained in taught:
            self._sample(ids_S, trained_S, trained, split, about | lost)
            lost = NOTHING

    def _sample(
        self, ids_S: np.ndarray, trained_S: np.ndarray, trained: int, split: int, row: dict[str, int]
    ) -> None:
        self.samples += 1
        self.splits[split] += 1
        self.tokens += len(ids_S)
        self.trained_tokens += trained
        for name, value in (row | {"offsets": self.tokens, "trained_counts": trained}).items():
            self.pending[name].append(value)
        self.pending["ids"].append(ids_S)
        self.pending["trained"].append(trained_S)

    def flush(self) -> None:
        """Writes what is pending."""
        for name, parts in self.pending.items():
            if parts:
                array = (
                    np.concatenate(parts)
                    if name in ("ids", "trained")
                    else np.array(parts, self.dtypes[name])
                )
                self.files[name].write(array.astype(self.dtypes[name]).tobytes())
                parts.clear()

    def report(self) -> dict[str, Any]:
        """Returns the account: rows = kept + the sum of dropped.

        split_turns makes several samples of a row; of a row that is kept it may leave out rounds that are too
        long, and parts in which nothing carries loss.
        """
        return {
            "rows": self.rows,
            "kept": self.kept,
            "samples": self.samples,
            "splits": {name: self.splits[index] for index, name in enumerate(SPLITS)},
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            **self.cuts,
            "dropped": {reason: self.dropped[reason] for reason in REASONS},
            "first_dropped": self.named,
            "unread": dict(self.unread) if self.declared else None,
            "answers_without_loss": self.answers_without_loss,
            "empty_thoughts": self.empty_thoughts,
        }

    def finish(self, about: dict[str, Any]) -> None:
        """Closes the files and writes meta.json, whose presence says that the store is complete."""
        self.flush()
        self.stack.close()
        names = [*(f"{n}.bin" for n in self.dtypes), DROPPED]
        sizes = {name: (self.folder / name).stat().st_size for name in names}
        found = {name: blocks.sums(self.folder / name) for name in names}
        meta = about | {"version": VERSION, "dtypes": self.dtypes, "sizes": sizes, "report": self.report()}
        meta["blocks"] = found
        (self.folder / META).write_text(json.dumps(meta | {"sum": _sum_of(meta)}, indent=1), encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns what `Writer.finish` wrote; raises ValueError when it is damaged, FileNotFoundError without
    it."""
    found = json.loads((folder / META).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.pop("sum", None) != _sum_of(found):
        raise ValueError(f"{META} is damaged")
    return found


def _sum_of(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode())
