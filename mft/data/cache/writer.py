"""The files of a token cache: written with counts of its rows, and checked for damage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mft.data.cache.blocks import sums
from mft.data.readers import row_text
from mft.data.split import SPLITS

if TYPE_CHECKING:
    from mft.data.tokenize import FittedRow

VERSION = 6
"""Part of the fingerprint of every store: a change of layout, splitting or encoding raises it."""

CUTS = ("truncated", "rounds_left_out", "parts_left_out")
"""What a row that is kept may have lost: it was truncated (0 or 1), rounds too long for any sample, and parts
in which nothing carries loss."""

TOKENS = ("ids", "trained")
"""Columns with an entry a token. They are much larger than the others, and not read at a start."""

COLUMNS = {
    "offsets": "int64",
    "trained_counts": "int32",
    "split": "uint8",
    "file": "int32",
    "line": "int64",
    "digest": "uint64",
    **dict.fromkeys(CUTS, "int32"),
}
"""Per-sample columns, one raw file each (`offsets.bin`, ...).

offsets has one entry more than there are samples: sample i is tokens offsets[i] to offsets[i + 1]. digest: of
its row's conversation; what the row lost stands with its first sample, 0 with the others.
"""

BAD_ROW, TOO_LONG, UNTRAINED = "bad row", "too long", "no trained token"

DROPPED = "dropped.jsonl"
"""The rows without a sample, one object each: file (its number), line, reason, field, problem, row."""

META = "meta.json"
"""The account of a store, with its own checksum and those of the files."""

DROPPED_NAMED = 20
"""Dropped rows that the report names, too."""

UNREAD_NAMED, OTHERS = 200, "other fields"
"""How many fields that no format reads are counted by their names, and what the others are counted as."""

Place = tuple[int, int]
"""Number of the file in `Task.files()`, line."""


class Writer:
    """The files of a store in the making, in an empty folder.

    `add` and `drop` account for every row; `finish` writes meta.json, last. account: rows = kept + the sum of
    dropped; split_turns makes several samples of a row. vocab_size: decides the width of an id; seq_length:
    `data.seq_length`, named in reasons.
    """

    def __init__(self, folder: Path, vocab_size: int, seq_length: int):
        self.folder, self.seq_length = folder, seq_length
        # uint16 halves file and page cache for the usual small vocabularies
        self.dtypes = COLUMNS | {"ids": "uint16" if vocab_size < 65536 else "uint32", "trained": "uint8"}
        self.pending: dict[str, list[Any]] = {name: [] for name in self.dtypes} | {"offsets": [0]}
        self.pending_dropped: list[str] = []
        self.account: dict[str, Any] = {
            **dict.fromkeys(("rows", "kept", "samples"), 0),
            "splits": dict.fromkeys(SPLITS, 0),
            **dict.fromkeys(("tokens", "trained_tokens", *CUTS), 0),
            "dropped": dict.fromkeys((BAD_ROW, TOO_LONG, UNTRAINED), 0),
            "first_dropped": [],
            "unread": {},
            **dict.fromkeys(("answers_without_loss", "empty_thoughts"), 0),
        }

    def drop(self, place: Place, row: object, reason: str, problem: str, field: str = "") -> None:
        """Counts a row without a sample, and writes it down."""
        self.account["rows"] += 1
        self.account["dropped"][reason] += 1
        about = {"file": place[0], "line": place[1], "reason": reason, "field": field, "problem": problem}
        if len(self.account["first_dropped"]) < DROPPED_NAMED:
            self.account["first_dropped"].append(about)
        self.pending_dropped.append(json.dumps(about | {"row": row_text(row)}) + "\n")
        if len(self.pending_dropped) == 1000:  # where no row is kept, nobody else flushes
            self.flush()

    def count_unread(self, fields: Iterable[str] | None) -> None:
        """Counts the fields of a row that its format does not read; None: it does not say which."""
        counts = self.account["unread"]
        if fields is None or counts is None:
            self.account["unread"] = None
            return
        for name in fields:
            # each row may have its own keys, e.g. its number, which are not worth the memory
            name = name if name in counts or len(counts) < UNREAD_NAMED else OTHERS
            counts[name] = counts.get(name, 0) + 1

    def add(self, place: Place, row: object, fitted: FittedRow, length: int, split: int, digest: int) -> None:
        """Takes the samples of one row, or drops the row where none is left or none would teach anything.

        length: the row's tokens before it was fitted; split: index in SPLITS; digest: of its conversation.
        """
        limit = self.seq_length
        if not fitted.parts:
            return self.drop(place, row, TOO_LONG, f"{length} tokens, data.seq_length is {limit}")
        # without the first token, which nothing predicts
        trained_counts = [int(trained_S[1:].sum()) for _, trained_S in fitted.parts]
        if not any(trained_counts):
            cut = f" left after cutting {length} tokens to data.seq_length {limit}" if length > limit else ""
            return self.drop(place, row, UNTRAINED, f"no token that carries loss{cut}")
        truncated = int(length > limit >= max(len(ids_S) for ids_S, _ in fitted.parts))
        lost = dict(zip(CUTS, (truncated, fitted.dropped_rounds, trained_counts.count(0)), strict=True))
        # The row's losses stand with its first sample alone, so that sums over samples are sums over rows.
        self._count({"rows": 1, "kept": 1, **lost})
        for (ids_S, trained_S), trained in zip(fitted.parts, trained_counts, strict=True):
            if not trained:  # e.g. a part of split_turns whose answers all carry no loss
                continue
            self._count({"samples": 1, "tokens": len(ids_S), "trained_tokens": trained})
            self.account["splits"][SPLITS[split]] += 1
            of_row = {"split": split, "file": place[0], "line": place[1], "digest": digest, **lost}
            of_sample = {"offsets": self.account["tokens"], "trained_counts": trained}
            for name, value in (of_row | of_sample | {"ids": ids_S, "trained": trained_S}).items():
                self.pending[name].append(value)
            lost = dict.fromkeys(CUTS, 0)

    def _count(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            self.account[name] += count

    def flush(self) -> None:
        """Appends what is pending to the files."""
        for name, values in self.pending.items():
            dtype = self.dtypes[name]  # numpy would take a list of large digests for floats
            flat = np.concatenate(values) if values and name in TOKENS else values
            array = np.asarray(flat, dtype)
            with (self.folder / f"{name}.bin").open("ab") as file:
                file.write(array.tobytes())
            values.clear()
        with (self.folder / DROPPED).open("a", encoding="utf-8") as lines:
            lines.writelines(self.pending_dropped)
        self.pending_dropped.clear()

    def finish(self, about: Mapping[str, object]) -> None:
        """Writes meta.json, whose presence says that the store is complete."""
        self.flush()
        paths = [self.folder / name for name in (*(f"{name}.bin" for name in self.dtypes), DROPPED)]
        meta = {
            **about,
            "version": VERSION,
            "dtypes": self.dtypes,
            "sizes": {path.name: path.stat().st_size for path in paths},
            "report": self.account,
            "blocks": {path.name: sums(path) for path in paths},
        }
        (self.folder / META).write_text(json.dumps(meta | {"sum": _sum_of(meta)}, indent=1), encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns what `Writer.finish` wrote; raises ValueError when it is damaged, OSError when it is gone."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or meta.pop("sum", None) != _sum_of(meta):
        raise ValueError(f"{META} is damaged")
    return meta


def _sum_of(meta: Mapping[str, object]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode())


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a store: "" when it is not there, None when nothing is.

    The files that are read as a whole at every start are held to their checksums here (45 bytes a sample);
    tokens are when they are first read (`blocks`).
    """
    if not (folder / META).exists():
        return ""
    try:
        meta = read_meta(folder)
        for name, size in meta["sizes"].items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, expected {size:,}"
            if path.stem not in TOKENS and sums(path) != meta["blocks"][name]:
                return f"{name} has another checksum than expected"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return error.strerror or str(error) if isinstance(error, OSError) else f"{META}: {error}"
    return None
