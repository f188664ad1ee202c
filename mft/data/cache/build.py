"""Rows of a task → its token cache: read here, tokenised by workers on all cores, written in order."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from mft.batch import Message
from mft.console import screen
from mft.data.cache.writer import BAD_ROW, Place, Writer, damage
from mft.data.formats import Format
from mft.data.readers import Rows
from mft.data.row_fields import SKIP_ADVICE, RowError
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.split import SPLITS, digest_of, split_of
from mft.data.task import Task
from mft.data.template import Segment
from mft.data.tokenize import Encoded, Encoder, fit_to_length
from mft.errors import UserError

BATCH_ROWS, BATCH_CHARACTERS = 1024, 4_000_000
"""Conversations given to the tokenizer at once, or fewer when they are long."""
AHEAD = 2
"""Batches tokenised while the next one is read; each is a call that uses all cores by itself."""


class ParsedRow(NamedTuple):
    """A row that was understood."""

    place: Place
    row: object
    """The parsed JSON, to be shown should the row be dropped later."""
    messages: list[Message]
    """What `row` means, by the task's format."""
    segments: list[Segment]
    """What is to be tokenised of it."""


def build(
    folder: Path,
    task: Task,
    contents: str,
    encoder: Encoder,
    settings: DataSettings,
    cache_dir: str | os.PathLike[str],
) -> None:
    """Makes the store `folder` of a task, unless another process was faster; contents: `Task.fingerprint`.

    It is written under another name and renamed when it is complete. Raises UserError as `write` does, where
    the cache cannot be written, and where the task's files change meanwhile.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            locked = lock.acquire(timeout=2)
        except Timeout:
            print(f"waiting for the process that tokenises {task.name} ({lock.lock_file})", file=sys.stderr)
            locked = lock.acquire()
        with locked:
            if damage(folder) is None:  # another process was faster
                return
            temporary = Path(f"{folder}.tmp")
            for stale in (folder, temporary):  # damaged, and left by a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            try:
                temporary.mkdir()
                write(temporary, task, encoder, settings)
                if task.fingerprint(cache_dir) != contents:  # the store would bear the name of other rows
                    changed = f"its files have changed while they were read ({', '.join(task.paths)})"
                    raise UserError(f"task.{task.name}: {changed}; start again once they are written")
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        problem = f"cannot write the tokens of task {task.name} to {folder}: {error.strerror}"
        raise UserError(f"cache_dir: {problem}") from error


def write(folder: Path, task: Task, encoder: Encoder, settings: DataSettings) -> None:
    """Tokenises all rows of a task into `folder`; memory does not grow with their number.

    Raises RowError at the first bad row under bad_rows=error, UserError at the first long one under
    long_samples=error.
    """
    files, splits, proportions = task.files(), task.splits(), task.proportions(settings.split)
    format_name, row_format = task.find_format()
    rows = task.rows()

    writer = Writer(folder, encoder.vocab_size, settings.seq_length)
    # Threads suffice: the tokenizer in Rust releases the interpreter's lock.
    with _progress(task.name, rows) as show, ThreadPoolExecutor(AHEAD) as pool:

        def keep(batch: list[ParsedRow], encoding: Future[list[Encoded]]) -> None:
            for (place, row, messages, _), encoded in zip(batch, encoding.result(), strict=True):
                length, limit = len(encoded[0]), settings.seq_length
                if length > limit and settings.long_samples == LongSamples.error:
                    raise UserError(
                        f"{files[place[0]]}:{place[1]}: {length} tokens, data.seq_length is {limit}; enlarge "
                        "it, or set data.long_samples to drop, truncate_left, truncate_right or split_turns"
                    )
                digest, of_file = digest_of(messages), splits[place[0]]
                split = SPLITS.index(of_file) if of_file else split_of(digest, proportions)
                fitted = fit_to_length(messages, encoded, encoder, settings)
                writer.add(place, row, fitted, length, split, digest)
            writer.flush()
            show(writer.account["rows"])

        waiting: deque[tuple[list[ParsedRow], Future[list[Encoded]]]] = deque()
        frozen_before = gc.get_freeze_count() > 0  # by the server that forks the workers
        # Or the collector walks over everything imported again and again, for the objects of the rows.
        gc.freeze()
        try:
            for batch in _batches(rows, files, row_format, encoder, settings, writer):
                waiting.append((batch, pool.submit(encoder.encode_segments, [row.segments for row in batch])))
                if len(waiting) > AHEAD:  # the oldest first: samples are written in the order of the rows
                    keep(*waiting.popleft())
            while waiting:
                keep(*waiting.popleft())
        finally:
            if not frozen_before:
                gc.unfreeze()
            pool.shutdown(cancel_futures=True)
    writer.finish({"task": task.name, "format": format_name})


def _batches(
    rows: Rows,
    files: Sequence[Path],
    row_format: Format,
    encoder: Encoder,
    settings: DataSettings,
    writer: Writer,
) -> Iterator[list[ParsedRow]]:
    """Yields the rows that can be understood, many at a time; the others are dropped, or end it."""
    numbers = {file: number for number, file in enumerate(files)}
    batch: list[ParsedRow] = []
    advice = ""
    characters = 0
    for file, line, row in rows:
        place = numbers[file], line
        try:
            if isinstance(row, RowError):
                raise row
            messages = row_format.messages(row)
            segments = encoder.template.segments(messages)
        except RowError as error:
            if settings.bad_rows == BadRows.error:
                raise error.at(file, line, advice) from None
            writer.drop(place, row, BAD_ROW, error.problem, error.field)
            continue
        advice = SKIP_ADVICE  # at least one row is sound
        writer.count_unread(row_format.unread(row))
        writer.account["answers_without_loss"] += sum(not message.train for message in messages)
        writer.account["empty_thoughts"] += sum(segment.thought for segment in segments)
        batch.append(ParsedRow(place, row, messages, segments))
        characters += sum(len(message.content) for message in messages)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _progress(name: str, rows: Rows) -> Iterator[Callable[[int], None]]:
    """Yields a function of the rows written so far that moves the bar, by the bytes that are read."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    # rich does not wrap columns that are plain text: in a narrow terminal the bar alone gets shorter
    before, after = "tokenising {task.description}", "{task.fields[written]:,} rows, left"
    columns = (before, BarColumn(bar_width=24), TaskProgressColumn(), after, TimeRemainingColumn())
    console = screen.console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=rows.total or None, written=0)
        yield lambda written: progress.update(bar, completed=rows.done, written=written)
