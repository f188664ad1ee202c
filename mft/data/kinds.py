"""Files that are not JSON lines: arrays of rows are read in chunks, other kinds refused with what to do."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mft.errors import UserError

CHUNK = 1 << 18
"""Bytes of an array that are read at once."""
LONGEST_ROW = 1 << 28
"""Characters of one row of an array; beyond that its text is taken to be broken."""

MAGIC = {
    b"\x1f\x8b": "gzip data; name it *.jsonl.gz",
    b"\x28\xb5\x2f\xfd": "zstandard data; name it *.jsonl.zst",
    b"PAR1": "a Parquet file; name it *.parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "bzip2 data; unpack it, or compress it as *.jsonl.gz or *.jsonl.zst",
    b"\xfd7zXZ": "xz data; unpack it, or compress it as *.jsonl.gz or *.jsonl.zst",
    b"ARROW1": "an Arrow file; convert it, e.g. with datasets: Dataset.from_file(…).to_json(…)",
    **dict.fromkeys(
        (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"
    ),
}
"""First bytes of a file → what it is and what to do."""


def refuse_other_kinds(file: Path, start: bytes) -> None:
    """Raises UserError for a file that its name or its first bytes show to hold no JSON."""
    # By its name: the first bytes of a table look like any text.
    if (ending := file.suffix.lower()) in (".csv", ".tsv"):
        delimiter = ", delimiter='\\t'" if ending == ".tsv" else ""
        raise UserError(
            f"{file}: is a table ({ending[1:].upper()}); rows are JSON lines. To convert it: python -c "
            f'"import csv, json, sys; [print(json.dumps(r)) for r in csv.DictReader(sys.stdin{delimiter})]" '
            f"< {file.name} > {file.stem}.jsonl"
        )
    kind = next((what for magic, what in MAGIC.items() if start.startswith(magic)), "")
    if not kind and b"\0" in start[:256]:
        kind = "binary data, or text in UTF-16 or UTF-32 (iconv -f UTF-16 -t UTF-8 converts that)"
    if kind:
        raise UserError(f"{file}: is {kind}. Rows are JSON in UTF-8, one object a line.")


def is_array(start: bytes) -> bool:
    """Whether a file that begins so is one JSON array of rows, and not lines of which the first is a list."""
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text.startswith(b"["):
        return False
    # JSON lines of which the first is a list begin with a line that is JSON by itself, and go on.
    line, _, following = text.partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not following.strip()


def array(file: IO[bytes], path: Path) -> Iterator[Any]:
    """Yields the elements of a JSON array without holding all of it; raises UserError where it is broken."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    decoder = json.JSONDecoder(object_pairs_hook=object_of)
    text, at, rows, ended = "", 0, 0, False
    expected = "["  # what stands next: [, first (a row or the end), row, or the comma after a row

    def broken(problem: str) -> UserError:
        after = f"after row {rows}" if rows else "before its first row"
        return UserError(f"{path}: is not a whole JSON array ({problem} {after}).")

    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if at < len(text) and expected != "row":
            if text[at] == "]" and expected != "[":
                if text[at + 1 :].strip() or file.read(CHUNK).strip():
                    raise UserError(f"{path}: text follows the end of its JSON array.")
                return
            if expected != "first" and text[at] != expected:
                raise broken(f"{text[at : at + 20]!r} stands where {expected!r} is expected")
            at += expected != "first"
            expected = "first" if expected == "[" else "row"
            continue
        if at < len(text):
            try:
                row, end = decoder.raw_decode(text, at)
                if end < len(text) or ended:  # else a number may continue in the next chunk
                    rows, at, expected = rows + 1, end, ","
                    yield row
                    continue
            except (Twice, RecursionError) as error:
                raise broken(str(error) if isinstance(error, Twice) else "it is nested too deeply") from error
            except ValueError as error:  # what is cut off looks like what is broken, until the file ends
                if ended or len(text) - at > LONGEST_ROW:
                    near = text[max(0, getattr(error, "pos", at) - 20) :][:40]
                    raise broken(f"{getattr(error, 'msg', error)} near {near!r}") from error
        elif ended:
            raise broken("it ends")
        # As much again as there is: a long row is then parsed a few times, not once for every chunk.
        block = file.read(max(CHUNK, len(text) - at))
        ended = not block
        try:
            text, at = text[at:] + decode(block, final=ended), 0
        except UnicodeDecodeError as error:
            raise broken(f"it is not UTF-8: byte {error.object[error.start : error.start + 1]!r}") from error


class Twice(ValueError):
    """A key that an object names twice; JSON readers silently keep the last one."""


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of JSON with these keys; raises Twice where one comes twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise Twice(f"the key {counts.most_common(1)[0][0]!r} comes twice in one object")
    return result
