"""Writes the token cache of one task, row by row; memory does not grow with the number of rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mft.batch import Message
from mft.data.formats import RowError
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.split import SPLITS, split_of
from mft.data.task import Task

if TYPE_CHECKING:
    from mft.data.tokenize import Encoder

VERSION = 1
"""Part of the fingerprint of every store: a change of layout, splitting or encoding raises it."""

COLUMNS = {"offsets": "int64", "trained_counts": "int32", "split": "uint8", "file": "int32", "line": "int64"}
"""Per-sample columns, one raw file each (`offsets.bin`, ...), beside `ids.bin` and `trained.bin`, which hold tokens.
offsets has one entry more than there are samples: sample i is tokens offsets[i] to offsets[i + 1]."""

BAD_ROW, TOO_LONG, UNTRAINED = "bad row", "too long", "no trained token"
REASONS = (BAD_ROW, TOO_LONG, UNTRAINED)

BATCH_ROWS = 1024  # conversations given to the tokenizer at once ...
BATCH_CHARACTERS = 4_000_000  # ... or fewer, when they are long
DROPPED_NAMED = 20

Place = tuple[int, int]
"""Number of the file in `Task.files()`, line."""


class Writer:
    """Files of a store in the making. `add` and `drop` account for every row; `finish` writes meta.json, last."""

    def __init__(self, folder: Path, vocab_size: int, settings: DataSettings):
        self.folder, self.settings = folder, settings
        # uint16 halves file and page cache for the usual small vocabularies
        self.dtypes = COLUMNS | {"ids": "uint16" if vocab_size < 65536 else "uint32", "trained": "uint8"}
        self.dropped: Counter[str] = Counter()
        self.named: list[dict[str, Any]] = []
        self.splits: Counter[int] = Counter()
        self.kept = self.truncated = self.tokens = self.trained_tokens = 0
        self.pending: dict[str, list[Any]] = {name: [] for name in self.dtypes}

    def __enter__(self) -> Writer:
        self.stack = ExitStack()
        self.files = {n: self.stack.enter_context((self.folder / f"{n}.bin").open("wb")) for n in self.dtypes}
        self.files["offsets"].write(np.zeros(1, self.dtypes["offsets"]).tobytes())
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def drop(self, place: Place, reason: str, problem: str) -> None:
        """Counts a row that does not become a sample; the first of them are kept by name."""
        self.dropped[reason] += 1
        if len(self.named) < DROPPED_NAMED:
            self.named.append({"file": place[0], "line": place[1], "reason": reason, "problem": problem})

    def add(self, place: Place, messages: Sequence[Message], ids_S: np.ndarray, trained_S: np.ndarray) -> None:
        """Takes a sample, or drops it where it is too long or would teach nothing."""
        length, limit = len(ids_S), self.settings.seq_length
        if length > limit:
            if self.settings.long_samples == LongSamples.drop:
                return self.drop(place, TOO_LONG, f"{length} tokens, data.seq_length is {limit}")
            ids_S, trained_S = ids_S[:limit], trained_S[:limit]
        trained = int(trained_S.sum())
        if not trained:
            cut = f" left after cutting {length} tokens to data.seq_length {limit}" if length > limit else ""
            return self.drop(place, UNTRAINED, f"no token that carries loss{cut}")
        split = split_of(messages, self.settings.split)
        self.kept += 1
        self.truncated += length > limit
        self.splits[split] += 1
        self.tokens += len(ids_S)
        self.trained_tokens += trained
        values = {"offsets": self.tokens, "trained_counts": trained, "split": split, "file": place[0], "line": place[1]}
        for name, value in values.items():
            self.pending[name].append(value)
        self.pending["ids"].append(ids_S)
        self.pending["trained"].append(trained_S)

    def flush(self) -> None:
        """Writes what is pending."""
        for name, parts in self.pending.items():
            if parts:
                array = np.concatenate(parts) if name in ("ids", "trained") else np.array(parts)
                self.files[name].write(array.astype(self.dtypes[name]).tobytes())
                parts.clear()

    def report(self) -> dict[str, Any]:
        """Returns the account of all rows: rows = kept + the sum of dropped."""
        return {
            "rows": self.kept + self.dropped.total(),
            "kept": self.kept,
            "splits": {name: self.splits[index] for index, name in enumerate(SPLITS)},
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "truncated": self.truncated,
            "dropped": {reason: self.dropped[reason] for reason in REASONS},
            "first_dropped": self.named,
        }

    def finish(self, about: dict[str, Any]) -> None:
        """Closes the files and writes meta.json, whose presence says that the store is complete."""
        self.flush()
        self.stack.close()
        sizes = {name: (self.folder / f"{name}.bin").stat().st_size for name in self.dtypes}
        meta = about | {"version": VERSION, "dtypes": self.dtypes, "sizes": sizes, "report": self.report()}
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def write(folder: Path, task: Task, encoder: Encoder, settings: DataSettings) -> None:
    """Tokenises all rows of a task into `folder`. Raises RowError at the first bad row under bad_rows=error."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("tokenising {task.description}: {task.completed} rows"), TimeElapsedColumn())
    console = Console(stderr=True)
    numbers = {file: number for number, file in enumerate(task.files())}
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        Writer(folder, encoder.vocab_size, settings) as writer,
    ):
        line_of_task = progress.add_task(task.name, total=None)
        batch: list[tuple[Place, list[Message]]] = []
        characters = 0

        def encode() -> None:
            for (place, messages), (ids_S, trained_S) in zip(
                batch, encoder.encode_batch(messages for _, messages in batch), strict=True
            ):
                writer.add(place, messages, ids_S, trained_S)
            writer.flush()
            batch.clear()

        for count, (file, line, row) in enumerate(task.rows(), start=1):
            place = numbers[file], line
            try:
                if isinstance(row, RowError):
                    raise row
                messages = task.format.messages(row)
            except RowError as error:
                if settings.bad_rows == BadRows.error:
                    raise _explained(error.at(file, line)) from None
                writer.drop(place, BAD_ROW, f"{error.field}: {error.problem}" if error.field else error.problem)
                continue
            batch.append((place, messages))
            characters += sum(len(message.content) for message in messages)
            if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
                encode()
                characters = 0
                progress.update(line_of_task, completed=count)
        encode()
        writer.finish({"task": task.name})


def _explained(error: RowError) -> RowError:
    problem = f"{error.problem} (data.bad_rows=skip counts such rows and goes on)"
    return RowError(error.field, problem, error.file, error.line)
