"""Rows of a task → its token cache: read and understood here, tokenised by all cores beside it, written in
order."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mft.console import screen
from mft.data.cache.writer import BAD_ROW, Place, Writer
from mft.data.formats import RowError
from mft.data.readers import Rows
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.split import SPLITS, digest_of, split_of
from mft.data.task import Task
from mft.data.template import Segment
from mft.data.tokenize import Encoded, fit_to_length
from mft.data.unread import NOTHING
from mft.errors import UserError

if TYPE_CHECKING:
    from mft.batch import Message
    from mft.data.tokenize import Encoder

BATCH_ROWS = 1024  # conversations given to the tokenizer at once ...
BATCH_CHARACTERS = 4_000_000  # ... or fewer, when they are long
AHEAD = 2  # batches being tokenised while the next one is read; each is a call that uses all cores by itself


class Read(NamedTuple):
    """A row that was understood."""

    place: Place
    row: Any
    messages: list[Message]
    segments: list[Segment]


def write(folder: Path, task: Task, encoder: Encoder, settings: DataSettings) -> None:
    """Tokenises all rows of a task into `folder`; memory does not grow with their number.

    Raises RowError at the first bad row under bad_rows=error, UserError at the first long one under
    long_samples=error.
    """
    files = task.files()
    format_name, _ = found = task.find_format()
    splits, proportions = task.splits(), task.proportions(settings.split)
    rows = task.rows()

    def keep(batch: Sequence[Read], encoded: Sequence[Encoded]) -> None:
        for (place, row, messages, _), sample in zip(batch, encoded, strict=True):
            length = len(sample[0])
            if length > settings.seq_length and settings.long_samples == LongSamples.error:
                raise UserError(
                    f"{files[place[0]]}:{place[1]}: {length} tokens, data.seq_length is "
                    f"{settings.seq_length}; allowed: a larger one, or data.long_samples = drop, "
                    "truncate_left, truncate_right, split_turns"
                )
            digest = digest_of(messages)
            of_file = splits[place[0]]
            split = SPLITS.index(of_file) if of_file else split_of(digest, proportions)
            writer.add(place, row, fit_to_length(messages, sample, encoder, settings), length, split, digest)
        writer.flush()

    with (
        Writer(folder, encoder.vocab_size, settings) as writer,
        _progress(task.name, rows) as show,
        ThreadPoolExecutor(AHEAD) as pool,
    ):
        waiting: deque[tuple[list[Read], Future[list[Encoded]]]] = deque()
        frozen = gc.get_freeze_count() > 0  # in a worker
        gc.freeze()  # or the collector walks over everything imported again and again, for the objects of the rows
        try:
            for batch in _batches(
                rows, found[1], encoder, settings, writer, {f: i for i, f in enumerate(files)}
            ):
                waiting.append(
                    (batch, pool.submit(encoder.encode_segments, [read.segments for read in batch]))
                )
                if len(waiting) > AHEAD:
                    done, future = waiting.popleft()
                    keep(done, future.result())
                show(writer)
            for done, future in waiting:
                keep(done, future.result())
                show(writer)
        finally:
            if not frozen:
                gc.unfreeze()
            pool.shutdown(cancel_futures=True)
        writer.finish({"task": task.name, "format": format_name})


def _batches(
    rows: Rows,
    row_format: Any,
    encoder: Encoder,
    settings: DataSettings,
    writer: Writer,
    numbers: dict[Path, int],
) -> Iterator[list[Read]]:
    """Yields the rows that can be understood, many at a time; the others are dropped, or end it."""
    batch: list[Read] = []
    understood = False
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
                found = error.at(file, line)
                raise (found.advised() if understood else found) from None
            writer.drop(place, row, BAD_ROW, error.problem, error.field)
            continue
        if (unread := row_format.unread(row)) != NOTHING:
            writer.leave_unread(unread)
        for message in messages:
            writer.answers_without_loss += not message.train
        for segment in segments:
            writer.empty_thoughts += segment.thought
        batch.append(Read(place, row, messages, segments))
        understood = True
        characters += sum(len(message.content) for message in messages)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _progress(name: str, rows: Rows) -> Iterator[Any]:
    """Yields a function of the writer that moves the bar: bytes read of all files, rows written."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    def unbroken() -> Column:
        return Column(no_wrap=True)  # in a narrow terminal the bar alone gets shorter

    columns = (
        TextColumn("tokenising {task.description}", table_column=unbroken()),
        BarColumn(bar_width=24),
        TaskProgressColumn(table_column=unbroken()),
        TextColumn("{task.fields[written]:,} rows, left", table_column=unbroken()),
        TimeRemainingColumn(table_column=unbroken()),
    )
    console = screen.console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=rows.total or None, written=0)

        def show(writer: Writer) -> None:
            progress.update(bar, completed=rows.done, written=writer.rows)

        yield show
