"""The token cache: each task is tokenised once, and every rank and every later run reads it memory-mapped.

Shapes: N samples of a store, K tasks, S tokens of one sample, F files of a task.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mft.batch import IGNORE, Row, Sample, Span
from mft.data.cache import writer
from mft.data.cache.blocks import Blocks, mapped
from mft.data.cache.build import build
from mft.data.row_fields import SKIP_ADVICE
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.split import SPLITS
from mft.data.task import Task
from mft.data.tokenize import Encoder
from mft.errors import UserError

WAIT_SECONDS = 24 * 3600.0
"""The last resort: when the building rank fails, the waiting ones are ended with it."""


class Store:
    """The samples of one task, in all splits. N is the number of samples.

    lengths_N: tokens of each; trained_N: tokens that carry loss; split_N: index in SPLITS; digest_N: equal
    where the conversations of two samples' rows are. report: the account of `Writer`, with format and
    duplicates (see `mark_duplicates`). contents: the fingerprint of the rows it was made of
    (`Task.fingerprint`). fingerprint: hash of contents, tokenizer, template and options.
    """

    def __init__(self, folder: Path, files: Sequence[Path], named_splits: Sequence[str], contents: str):
        """files: `Task.files()`, by which samples are traced to file and line; named_splits: those of
        `Task`."""
        meta = writer.read_meta(folder)
        self.contents, self.fingerprint = contents, folder.name
        self.files, self._named_splits = list(files), list(named_splits)
        dtypes = meta["dtypes"]
        column = {name: mapped(folder / f"{name}.bin", dtypes[name]) for name in writer.COLUMNS}
        sums = meta["blocks"]
        self._ids = Blocks(folder / "ids.bin", dtypes["ids"], sums["ids.bin"])
        self._trained = Blocks(folder / "trained.bin", dtypes["trained"], sums["trained.bin"])
        # Views of the mapped file: starting reads no more of it than the checksums need.
        self._start_N, self._stop_N = column["offsets"][:-1], column["offsets"][1:]
        self._file_N, self._line_N, self.split_N = column["file"], column["line"], column["split"]
        self.trained_N, self.digest_N = column["trained_counts"], column["digest"]
        self._lost_N = {name: column[name] for name in writer.CUTS}
        self.lengths_N = (self._stop_N - self._start_N).astype(np.int32)
        self.report: dict[str, Any] = meta["report"] | {"format": meta["format"]}
        self.report["first_dropped"] = [self._shown(row) for row in self.report["first_dropped"]]
        self._dropped = folder / writer.DROPPED
        self._left_out: list[tuple[str, np.ndarray]] = []
        """Reason → int64 [rows, 4]: file and line of each row, then of one that says the same (or 0, 0)."""

    def __len__(self) -> int:
        return len(self.lengths_N)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids_S int32 and trained_S bool of sample i, in constant time."""
        start, stop = int(self._start_N[i]), int(self._stop_N[i])
        return self._ids.part(start, stop).astype(np.int32), self._trained.part(start, stop).astype(bool)

    def origin(self, i: int) -> str:
        """Returns `file:line` of sample i."""
        return self._place(self._file_N[i], self._line_N[i])

    def dropped(self) -> Iterator[dict[str, Any]]:
        """Yields every row without a sample: file, line, reason, field, problem, row (its shortened text)."""
        with self._dropped.open(encoding="utf-8") as lines:
            for dropped in map(json.loads, lines):
                yield dropped | {"file": str(self.files[dropped["file"]])}
        for reason, rows in self._left_out:
            for file, line, same_file, same_line in rows.tolist():
                same = self._place(same_file, same_line) if same_line else "a validation or test row"
                about = {
                    "file": str(self.files[file]),
                    "line": line,
                    "reason": reason,
                    "field": "",
                    "row": "",
                }
                yield about | {"problem": f"repeats {same}"}

    def held_out_files(self) -> list[dict[str, str | int]]:
        """Returns the files held out by their names: file, split (valid or test), number of kept rows."""
        rows_F = np.bincount(self._file_N[self.begins_N()], minlength=len(self.files))
        return [
            {"file": str(file), "split": split, "rows": int(rows)}
            for file, split, rows in zip(self.files, self._named_splits, rows_F, strict=True)
            if split
        ]

    def leave_out(self, out_N: np.ndarray, reason: str, same_N: np.ndarray | None = None) -> None:
        """Takes rows out of the store, as if they had been dropped while it was made; renumbers its samples.

        out_N: bool, equal for all samples of a row; same_N: a sample of the row that says the same.
        """
        first_N = np.flatnonzero(out_N & self.begins_N())
        place_N = np.stack([self._file_N, self._line_N], axis=1)
        same = np.zeros_like(place_N[first_N]) if same_N is None else place_N[same_N[first_N]]
        self._left_out.append((reason, np.hstack([place_N[first_N], same])))
        report = self.report
        report["dropped"][reason] = len(first_N)
        report["kept"] -= len(first_N)
        report["samples"] -= int(out_N.sum())
        for index, name in enumerate(SPLITS):
            report["splits"][name] -= int((self.split_N[out_N] == index).sum())
        sums = {"tokens": self.lengths_N, "trained_tokens": self.trained_N, **self._lost_N}
        for name, count_N in sums.items():
            report[name] -= int(count_N[out_N].sum(dtype=np.int64))
        if not out_N.any():  # what is mapped stays mapped; the columns below are copied into memory
            return
        keep_N = ~out_N
        self._lost_N = {name: count_N[keep_N] for name, count_N in self._lost_N.items()}
        for name, column in vars(self).items():
            if name.endswith("_N") and isinstance(column, np.ndarray):
                setattr(self, name, column[keep_N])

    def begins_N(self) -> np.ndarray:
        """Returns bool: whether a sample is the first one of its row."""
        # Samples are in the order of their rows, so a row begins where file or line change.
        return (np.diff(self._line_N, prepend=-1) != 0) | (np.diff(self._file_N, prepend=-1) != 0)

    def _shown(self, dropped: dict[str, Any]) -> dict[str, str]:
        problem = ": ".join(filter(None, (dropped["field"], dropped["problem"])))
        where = self._place(dropped["file"], dropped["line"])
        return {"where": where, "reason": dropped["reason"], "problem": problem}

    def _place(self, file: int, line: int) -> str:
        return f"{self.files[file]}:{line}"


class Samples:
    """The samples of all tasks in one split, numbered through: N of them, task after task.

    lengths_N: tokens of each; task_N: index of its store; `sample(i).index` is its number inside that store.
    limit: only the first so many of each task.
    """

    def __init__(self, stores: Sequence[Store], split: str = "train", limit: int | None = None):
        self.stores = list(stores)
        chosen = [np.flatnonzero(store.split_N == SPLITS.index(split))[:limit] for store in self.stores]
        self.task_N = np.repeat(np.arange(len(chosen), dtype=np.int32), [len(c) for c in chosen])
        self.index_N = np.concatenate([*chosen, np.empty(0, np.int64)]).astype(np.int64)
        lengths = [store.lengths_N[c] for store, c in zip(self.stores, chosen, strict=True)]
        self.lengths_N = np.concatenate([*lengths, np.empty(0, np.int32)]).astype(np.int32)
        trained = [store.trained_N[c] for store, c in zip(self.stores, chosen, strict=True)]
        self._trained_K = np.array([part.sum(dtype=np.int64) for part in trained])

    def __len__(self) -> int:
        return len(self.index_N)

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the samples and the trained tokens of each task, int64 and float64 [K]."""
        return np.bincount(self.task_N, minlength=len(self.stores)), self._trained_K.astype(np.float64)

    def sample(self, i: int | Span) -> Sample:
        """Returns sample i, or a span of a sample."""
        number, start, stop = i if isinstance(i, Span) else (i, 0, None)
        task, index = int(self.task_N[number]), int(self.index_N[number])
        ids_S, trained_S = self.stores[task].sample(index)
        # The span's last token predicts the first one after it, which the next row holds.
        goes_on = stop is not None and stop < len(ids_S) and trained_S[stop]
        following = int(ids_S[stop]) if goes_on else IGNORE
        return Sample(ids_S[start:stop], trained_S[start:stop], task, index, following)

    def row_length(self, row: Row) -> int:
        """Returns the tokens of a row."""
        return sum(i.stop - i.start if isinstance(i, Span) else int(self.lengths_N[i]) for i in row)

    def load(self, rows: Sequence[Row]) -> list[list[Sample]]:
        """Returns the samples of rows, ready for `collate`."""
        return [[self.sample(i) for i in row] for row in rows]

    def origin(self, i: int) -> str:
        """Returns `file:line` of sample i."""
        return self.stores[self.task_N[i]].origin(int(self.index_N[i]))


def is_prepared(
    task: Task, encoder: Encoder, settings: DataSettings, cache_dir: str | os.PathLike[str]
) -> bool:
    """Whether the cache has the store of a task."""
    fingerprint = _store_fingerprint(task, task.fingerprint(cache_dir), encoder, settings)
    return writer.damage(Path(cache_dir) / "tokens" / fingerprint) is None


def prepare(
    task: Task,
    encoder: Encoder,
    settings: DataSettings,
    cache_dir: str | os.PathLike[str],
    first: bool = True,
) -> Store:
    """Returns the store of a task, tokenising it where the cache does not have it.

    first: this process builds a missing store (only one does, when several try); otherwise it waits until
    another one has. Raises UserError for missing files, a bad row under bad_rows=error, a task of which no
    row is left.
    """
    settings.check()
    contents = task.fingerprint(cache_dir)
    folder = Path(cache_dir) / "tokens" / _store_fingerprint(task, contents, encoder, settings)
    if not first:
        _wait(folder, task)
    elif (problem := writer.damage(folder)) is not None:
        if problem:
            print(
                f"Rebuilding task.{task.name}: the token cache {folder} is damaged: {problem}",
                file=sys.stderr,
            )
        build(folder, task, contents, encoder, settings, cache_dir)
    store = Store(folder, task.files(), task.named_splits(), contents)
    dropped = store.report["dropped"]
    if settings.bad_rows == BadRows.error and dropped[writer.BAD_ROW]:  # built by a run that skipped them
        bad = next((row for row in store.report["first_dropped"] if row["reason"] == writer.BAD_ROW), None)
        example = f", e.g. {bad['where']}: {bad['problem']}" if bad else ""
        raise UserError(f"task.{task.name}: {dropped[writer.BAD_ROW]} bad rows{example}{SKIP_ADVICE}")
    if not len(store):
        if not (reasons := ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)):
            raise UserError(f"task.{task.name}: its files are empty.")
        places = "".join(f"\n  {row['where']}: {row['problem']}" for row in store.report["first_dropped"][:3])
        raise UserError(f"task.{task.name}: all {store.report['rows']} rows were dropped ({reasons}){places}")
    return store


def _store_fingerprint(task: Task, contents: str, encoder: Encoder, settings: DataSettings) -> str:
    """Returns the hash of what decides the samples of a task, not of what only decides whether to stop."""
    # Values arrive from yaml or from Python: as plain text and floats they hash alike.
    long_samples, split = LongSamples(settings.long_samples).value, [float(part) for part in settings.split]
    options = [settings.seq_length, long_samples, split]
    parts = [writer.VERSION, contents, repr(task.format), encoder.fingerprint(), options]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def _wait(folder: Path, task: Task) -> None:
    start = time.monotonic()
    while writer.damage(folder) is not None:
        if time.monotonic() - start > WAIT_SECONDS:
            raise UserError(f"task.{task.name}: after {WAIT_SECONDS:.0f} s no rank has written {folder}")
        time.sleep(0.1)
