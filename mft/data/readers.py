"""Files of rows: JSON lines, plain or compressed, JSON arrays, Parquet, and datasets of the hub."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.data import hub
from mft.data.kinds import array, is_array, object_of, refuse_other_kinds
from mft.data.row_fields import RowError
from mft.errors import UserError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

BOM = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""Endings of the files that a folder is searched for."""

SHOWN_CHARACTERS = 2000
"""Characters of an unreadable line that are kept to show it."""


def stem(path: Path) -> str:
    """Returns the name of a data file without its suffixes."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)]


class Rows:
    """The rows of files in order: iterating yields (file, line number from 1, parsed row).

    Where a line is not valid JSON in UTF-8 the third is the RowError that says so, instead of being raised:
    the caller decides whether to stop. Blank lines are no rows; a byte order mark and CRLF line ends are
    accepted. In Parquet files, data sets and JSON arrays the line is the number of the row. Raises UserError
    for a file that cannot be read to its end, and for one of another kind (UTF-16, CSV, gzip without its
    ending …), with what to do.

    total, done: bytes of all files on disk, and those read so far.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.total = sum(file.stat().st_size for file in self.files if not hub.is_name(file))
        self.done = 0

    def __iter__(self) -> Iterator[tuple[Path, int, Any]]:
        before = 0
        for file in self.files:
            try:
                if hub.is_name(file):
                    for number, row in enumerate(hub.load(str(file)), start=1):
                        yield file, number, row
                    continue
                size = file.stat().st_size
                if file.name.lower().endswith(".parquet"):
                    yield from self._parquet(file, before, size)
                else:
                    yield from self._lines(file, before)
            except (OSError, EOFError, zlib.error) as error:
                problem = str(error)
                if file.suffix.lower() == ".zst" and isinstance(error, OSError) and error.errno is None:
                    cut = "Truncated" in problem
                    problem = "it was cut; fetch it again" if cut else f"it is not zstandard data ({problem})"
                raise UserError(f"{file}: cannot be read to its end: {problem}") from error
            before += size
            self.done = before

    def _lines(self, file: Path, before: int) -> Iterator[tuple[Path, int, Any]]:
        with file.open("rb") as raw, _decompressed(file, raw) as lines:
            start = lines.peek(1 << 12)  # of what is decompressed, so that *.gz of another kind shows, too
            refuse_other_kinds(file, start)
            if is_array(start):
                for number, row in enumerate(array(lines, file), start=1):
                    self.done = before + raw.tell()
                    yield file, number, row
                return
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(BOM)
                if number % 256 == 0:  # tell() of every line would cost as much as reading it
                    self.done = before + raw.tell()
                if line.strip():
                    yield file, number, _parsed(line, file, number)

    def _parquet(self, file: Path, before: int, size: int) -> Iterator[tuple[Path, int, Any]]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if twice is not None:  # as dicts the rows would silently keep the last one
                raise UserError(f"{file}: the column {twice!r} comes twice")
            for batch in table.iter_batches(batch_size=1024):
                for row in _rows_of(batch):
                    number += 1
                    yield file, number, row.at(file, number) if isinstance(row, RowError) else row
                self.done = before + size * number // max(1, table.metadata.num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{file}: is not a readable Parquet file: {problem}") from error


def _rows_of(batch: RecordBatch) -> Iterator[dict[str, Any] | RowError]:
    """Yields the rows of a record batch; a RowError where Python cannot hold a value.

    Such are text that is not UTF-8, and times outside the years 1 to 9999 or finer than microseconds.
    """
    with suppress(ValueError, OverflowError):  # raised before the first row, without saying which one it is
        yield from batch.to_pylist()
        return
    for i in range(batch.num_rows):
        row: dict[str, Any] = {}
        try:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                row[name] = column[i].as_py()
        except (ValueError, OverflowError) as error:
            problem = f"holds a value that cannot be read: {error}"
            yield RowError(name, problem, repr(row)[:SHOWN_CHARACTERS])
        else:
            yield row


def row_text(row: object) -> str:
    """Returns a row to be shown, at most SHOWN_CHARACTERS of it."""
    if isinstance(row, RowError):
        return row.text
    return json.dumps(row, ensure_ascii=False, default=str)[:SHOWN_CHARACTERS]


def _decompressed(file: Path, raw: io.BufferedReader) -> Any:
    """Returns the bytes of a file as a buffered stream that can `peek`."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix != ".zst":
        return raw
    import pyarrow

    # The package zstandard takes a file that was cut for a short one; pyarrow raises OSError without errno.
    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(stream, 1 << 17)


_DECODER = json.JSONDecoder(object_pairs_hook=object_of)


def _parsed(line: bytes, file: Path, number: int) -> Any:
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = line[error.start : error.start + 1]
        problem = f"is not UTF-8: byte {byte!r} at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        around = error.doc[max(0, error.pos - 20) : error.pos + 20].strip()
        problem = f"is not JSON: {error.msg} at character {error.pos}, near {around!r}"
        # a first line that opens an object and breaks off is most often JSON that was written with indents
        if number == 1 and error.doc.strip()[:1] == "{":
            problem += f"; if its objects span several lines: jq -c . {file.name} > {file.name}.jsonl"
    except RecursionError:
        problem = "is not usable: its JSON is nested too deeply"
    except ValueError as error:  # a key that comes twice, an integer of more digits than Python converts
        problem = f"is not usable: {error}"
    text = line[:SHOWN_CHARACTERS].decode("utf-8", "replace").rstrip("\r\n")
    return RowError("", problem, text).at(file, number)
