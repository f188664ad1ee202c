"""Writes the token cache of one task, row by row; memory does not grow with the number of rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mft.data.formats import RowError
from mft.data.long import Encoded, fitted
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.split import SPLITS, split_of
from mft.data.task import Task
from mft.errors import UserError

if TYPE_CHECKING:
    from mft.batch import Message
    from mft.data.template import Piece
    from mft.data.tokenize import Encoder

VERSION = 2
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
        self.kept = self.samples = self.truncated = self.tokens = self.trained_tokens = 0
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

    def add(self, place: Place, parts: Sequence[Encoded], length: int, split: int) -> None:
        """Takes the samples of one row, or drops the row where none is left or none would teach anything.

        parts: what `fitted` made of the row; length: its tokens before.
        """
        limit = self.settings.seq_length
        if not parts:
            return self.drop(place, TOO_LONG, f"{length} tokens, data.seq_length is {limit}")
        counted = [(ids_S, trained_S, int(trained_S[1:].sum())) for ids_S, trained_S in parts]
        taught = [part for part in counted if part[2]]  # nothing predicts a first token, so it does not count
        if not taught:
            cut = f" left after cutting {length} tokens to data.seq_length {limit}" if length > limit else ""
            return self.drop(place, UNTRAINED, f"no token that carries loss{cut}")
        self.kept += 1
        self.truncated += length > limit
        for ids_S, trained_S, trained in taught:
            self._sample(place, ids_S, trained_S, trained, split)

    def _sample(self, place: Place, ids_S: np.ndarray, trained_S: np.ndarray, trained: int, split: int) -> None:
        self.samples += 1
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
        """Returns the account: rows = kept + the sum of dropped. split_turns makes several samples of a row."""
        return {
            "rows": self.kept + self.dropped.total(),
            "kept": self.kept,
            "samples": self.samples,
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
    of_paths = task.training_files()
    train, valid, test = settings.split
    proportions = [train + valid, 0.0, test] if task.valid else settings.split
    format_name, row_format = task.settled_format()
    rows = task.rows()
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        Writer(folder, encoder.vocab_size, settings) as writer,
    ):
        line_of_task = progress.add_task(task.name, total=None)
        batch: list[tuple[Place, list[Message], list[Piece]]] = []
        characters = 0

        def encode() -> None:
            encoded = encoder.encode_pieces([pieces for _, _, pieces in batch])
            for (place, messages, _), (ids_S, trained_S) in zip(batch, encoded, strict=True):
                length = len(ids_S)
                if length > settings.seq_length and settings.long_samples == LongSamples.error:
                    files = task.files()
                    raise UserError(
                        f"{files[place[0]]}:{place[1]}: {length} tokens, data.seq_length is {settings.seq_length}; "
                        "allowed: a larger one, or data.long_samples = drop, truncate_left, truncate_right, split_turns"
                    )
                split = SPLITS.index("valid") if place[0] >= of_paths else split_of(messages, proportions)
                writer.add(place, fitted(messages, (ids_S, trained_S), encoder, settings), length, split)
            writer.flush()
            batch.clear()

        for count, (file, line, row) in enumerate(rows, start=1):
            place = numbers[file], line
            try:
                if isinstance(row, RowError):
                    raise row
                messages = row_format.messages(row)
                pieces = encoder.template.pieces(messages)
            except RowError as error:
                if settings.bad_rows == BadRows.error:
                    raise _explained(error.at(file, line)) from None
                writer.drop(place, BAD_ROW, f"{error.field}: {error.problem}" if error.field else error.problem)
                continue
            batch.append((place, messages, pieces))
            characters += sum(len(message.content) for message in messages)
            if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
                encode()
                characters = 0
                progress.update(line_of_task, completed=count)
        encode()
        writer.finish({"task": task.name, "format": format_name})


def _explained(error: RowError) -> RowError:
    problem = f"{error.problem} (data.bad_rows=skip counts such rows and goes on)"
    return RowError(error.field, problem, error.file, error.line)
