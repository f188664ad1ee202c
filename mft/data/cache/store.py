"""The token cache: each task is tokenised once, and every rank and every later run reads it memory-mapped."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from mft.batch import IGNORE, Row, Sample, Span
from mft.data.cache import build, writer
from mft.data.cache.blocks import Blocks, mapped, sums
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.split import SPLITS
from mft.data.task import Task
from mft.errors import UserError

if TYPE_CHECKING:
    from mft.data.tokenize import Encoder

# the last resort: when the building rank fails, the waiting ones are ended with it
WAIT_SECONDS = 24 * 3600.0


PER_SAMPLE = ("_start_N", "_stop_N", "_file_N", "_line_N", "split_N", "trained_N", "digest_N", "lengths_N")
"""The columns of a Store, beside those of what its rows lost (`writer.CUTS`)."""


class Store:
    """The samples of one task, in all splits. N is the number of samples.

    lengths_N: tokens of each; trained_N: tokens that carry loss; split_N: index in SPLITS. report: rows,
    kept, splits, tokens, trained_tokens, truncated, dropped {reason: count}, first_dropped, unread
    (understood rows with a field that the format does not read, by field; None: it does not say),
    answers_without_loss, empty_thoughts (that the template puts before answers), duplicates (see
    `mark_duplicates`). contents: the fingerprint of the rows it was made of (`Task.fingerprint`), "" until
    `prepare` sets it. fingerprint: hash of contents, tokenizer, template and options. digest_N: equal where
    the conversations of two samples' rows are.
    """

    def __init__(self, folder: Path, files: Sequence[Path], named: Sequence[str]):
        """files: `Task.files()`, by which samples are traced to file and line; named:
        `Task.named_splits()`."""
        meta = writer.read_meta(folder)
        self.contents = ""
        self.fingerprint = folder.name
        self.files = list(files)
        column = {name: mapped(folder / f"{name}.bin", dtype) for name, dtype in meta["dtypes"].items()}
        self._ids, self._trained = (
            Blocks(folder / f"{name}.bin", meta["dtypes"][name], meta["blocks"][f"{name}.bin"])
            for name in ("ids", "trained")
        )
        self._start_N, self._stop_N = column["offsets"][:-1], column["offsets"][1:]
        self._file_N, self._line_N = column["file"], column["line"]
        self.split_N, self.trained_N, self.digest_N = (
            column["split"],
            column["trained_counts"],
            column["digest"],
        )
        self._cuts_N = {name: column[name] for name in writer.CUTS}
        self.lengths_N = (self._stop_N - self._start_N).astype(np.int32)
        self.report: dict[str, Any] = meta["report"]
        self.report["format"] = meta["format"]
        self.report["first_dropped"] = [self._dropped_row(d) for d in self.report["first_dropped"]]
        self._named = list(named)
        self._dropped = folder / writer.DROPPED
        self._left_out: list[tuple[str, tuple[np.ndarray, ...]]] = []

    def __len__(self) -> int:
        return len(self.lengths_N)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids_S int32 and trained_S bool of sample i, in constant time."""
        start, stop = int(self._start_N[i]), int(self._stop_N[i])
        return self._ids.part(start, stop).astype(np.int32), self._trained.part(start, stop).astype(bool)

    def origin(self, i: int) -> str:
        """Returns `file:line` of sample i."""
        return self._where(self._file_N[i], self._line_N[i])

    def dropped(self) -> Iterator[dict[str, Any]]:
        """Yields every row that is no sample: file, line, reason, field, problem, row (its text,
        shortened)."""
        with self._dropped.open(encoding="utf-8") as lines:
            for line in lines:
                dropped = json.loads(line)
                yield dropped | {"file": str(self.files[dropped["file"]])}
        for reason, rows in self._left_out:
            for file, line, same_file, same_line in zip(*(column.tolist() for column in rows), strict=True):
                about = {
                    "file": str(self.files[file]),
                    "line": line,
                    "reason": reason,
                    "field": "",
                    "row": "",
                }
                same = (
                    self._where(same_file, same_line) if same_line else "a row of a validation or test part"
                )
                yield about | {"problem": f"says the same as {same}"}

    def held_out_files(self) -> list[dict[str, Any]]:
        """Returns the files held out by their names: file, split (valid or test), rows of it that are
        kept."""
        rows_F = np.bincount(self._file_N[self.begins_N()], minlength=len(self.files))
        return [
            {"file": str(file), "split": split, "rows": int(rows)}
            for file, split, rows in zip(self.files, self._named, rows_F, strict=True)
            if split
        ]

    def leave_out(self, out_N: np.ndarray, reason: str, same_N: np.ndarray | None = None) -> None:
        """Takes rows out of the store, as if they had been dropped while it was made; samples get other
        numbers.

        out_N: bool, equal for all samples of a row; same_N: a sample of the row in this store that says the
        same.
        """
        report, first_N = self.report, np.flatnonzero(out_N & self.begins_N())
        nowhere = np.zeros(len(first_N), np.int64)
        same = nowhere if same_N is None else same_N[first_N]
        same_line = nowhere if same_N is None else self._line_N[same]
        rows = (
            self._file_N[first_N],
            self._line_N[first_N],
            self._file_N[same] if len(same) else nowhere,
            same_line,
        )
        self._left_out.append((reason, rows))
        report["dropped"][reason] = len(first_N)
        report["kept"] -= len(first_N)
        report["samples"] -= int(out_N.sum())
        for index, name in enumerate(SPLITS):
            report["splits"][name] -= int((self.split_N[out_N] == index).sum())
        report["tokens"] -= int(self.lengths_N[out_N].sum(dtype=np.int64))
        report["trained_tokens"] -= int(self.trained_N[out_N].sum(dtype=np.int64))
        for name, count_N in self._cuts_N.items():
            report[name] -= int(count_N[out_N].sum())
        if out_N.any():
            self._cuts_N = {name: count_N[~out_N] for name, count_N in self._cuts_N.items()}
            for name in PER_SAMPLE:
                setattr(self, name, getattr(self, name)[~out_N])

    def begins_N(self) -> np.ndarray:
        """Returns bool: whether a sample is the first one of its row."""
        return (np.diff(self._line_N, prepend=-1) != 0) | (np.diff(self._file_N, prepend=-1) != 0)

    def _dropped_row(self, dropped: dict[str, Any]) -> dict[str, str]:
        problem = f"{dropped['field']}: {dropped['problem']}" if dropped["field"] else dropped["problem"]
        where = self._where(dropped["file"], dropped["line"])
        return {"where": where, "reason": dropped["reason"], "problem": problem}

    def _where(self, file: int, line: int) -> str:
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
        self._trained_K = np.array(
            [s.trained_N[c].sum(dtype=np.int64) for s, c in zip(self.stores, chosen, strict=True)]
        )

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
    files = task.files()
    contents = task.fingerprint(cache_dir)
    folder = Path(cache_dir) / "tokens" / store_fingerprint(task, contents, encoder, settings)
    if (problem := _problem(folder)) is not None:
        if first:
            if problem:
                print(
                    f"task.{task.name}: the token cache {folder} is damaged: {problem}. It is made anew.",
                    file=sys.stderr,
                )
            _build(folder, task, contents, encoder, settings, cache_dir)
        else:
            _wait(folder, task)
    store = Store(folder, files, task.named_splits())
    store.contents = contents
    dropped = store.report["dropped"]
    if settings.bad_rows == BadRows.error and dropped[writer.BAD_ROW]:  # built by a run that skipped them
        bad = next((d for d in store.report["first_dropped"] if d["reason"] == writer.BAD_ROW), None)
        example = f", e.g. {bad['where']}: {bad['problem']}" if bad else ""
        raise UserError(
            f"task.{task.name}: {dropped[writer.BAD_ROW]} bad rows{example} "
            "(data.bad_rows=skip leaves such rows out and counts them)"
        )
    if not len(store):
        if not (reasons := ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)):
            raise UserError(f"task.{task.name}: its files are empty.")
        places = "".join(f"\n  {d['where']}: {d['problem']}" for d in store.report["first_dropped"][:3])
        raise UserError(f"task.{task.name}: all {store.report['rows']} rows were dropped ({reasons}){places}")
    return store


def store_fingerprint(task: Task, contents: str, encoder: Encoder, settings: DataSettings) -> str:
    """Returns the hash of all that decides the samples of a task; not of what only decides whether to stop.

    contents: `task.fingerprint()`.
    """
    options = [
        settings.seq_length,
        LongSamples(settings.long_samples).value,
        [float(part) for part in settings.split],
    ]
    parts = [writer.VERSION, contents, repr(task.format), encoder.fingerprint(), options]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def _build(
    folder: Path,
    task: Task,
    contents: str,
    encoder: Encoder,
    settings: DataSettings,
    cache_dir: str | os.PathLike[str],
) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, task):
            if _problem(folder) is None:  # another process was faster
                return
            temporary = Path(f"{folder}.tmp")
            for left in (folder, temporary):  # damaged, and of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                temporary.mkdir()
                build.write(temporary, task, encoder, settings)
                if (
                    task.fingerprint(cache_dir) != contents
                ):  # else the store would bear the name of other rows
                    raise UserError(
                        f"task.{task.name}: its files have changed while they were read "
                        f"({', '.join(task.paths)}); start again once they are written"
                    )
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cache_dir: cannot write the tokens of task {task.name} to {folder}: {error.strerror}"
        ) from error


@contextmanager
def _locked(folder: Path, task: Task) -> Iterator[None]:
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=2)
    except Timeout:
        print(
            f"another process tokenises the task {task.name}; waiting for it ({lock.lock_file})",
            file=sys.stderr,
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _wait(folder: Path, task: Task) -> None:
    start = time.monotonic()
    while _problem(folder) is not None:
        if time.monotonic() - start > WAIT_SECONDS:
            hours = WAIT_SECONDS / 3600
            raise UserError(
                f"task.{task.name}: waited {hours:.0f} hours for the first rank to write {folder}"
            )
        time.sleep(0.1)


def _problem(folder: Path) -> str | None:
    """Returns what is wrong with a store: "" when there is none, None when nothing is.

    The files that are read as a whole at every start are held to their checksums here (45 bytes a sample);
    tokens are when they are first read.
    """
    if not (folder / writer.META).exists():
        return ""
    try:
        meta = writer.read_meta(folder)
        for name, size in meta["sizes"].items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes, expected {size:,}"
            if name not in ("ids.bin", "trained.bin") and sums(folder / name) != meta["blocks"][name]:
                return f"{name} has another checksum than expected"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return error.strerror or str(error) if isinstance(error, OSError) else f"{writer.META}: {error}"
    return None
