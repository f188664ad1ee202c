"""Files that are not JSON lines: arrays of rows are read piece by piece, other kinds are refused with what to
do."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mft.errors import UserError

CHUNK = 1 << 18
LONGEST_ROW = 1 << 28
"""Characters of one row of an array; beyond that its text is taken to be broken."""

MAGIC = {
    b"\x1f\x8b": "gzip data; name it *.jsonl.gz",
    b"\x28\xb5\x2f\xfd": "zstandard data; name it *.jsonl.zst",
    b"PAR1": "a Parquet file; name it *.parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "bzip2 data; unpack it, or compress it as *.jsonl.gz or *.jsonl.zst",
    b"\xfd7zXZ": "xz data; unpack it, or compress it as *.jsonl.gz or *.jsonl.zst",
    b"ARROW1": "an Arrow file; write it as Parquet or JSON lines, e.g. with datasets: Dataset.from_file(…).to_json(…)",
    codecs.BOM_UTF16_LE: "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
}
"""First bytes of a file → what it is and what to do."""


def refuse_other_kinds(file: Path, start: bytes) -> None:
    """Raises UserError for a file that its name or its first bytes show to hold no JSON."""
    if (ending := file.suffix.lower()) in (".csv", ".tsv"):
        delimiter = ", delimiter='\\t'" if ending == ".tsv" else ""
        raise UserError(
            f"{file}: is a table ({ending[1:].upper()}); rows are JSON, one object a line. To convert it: "
            f"python -c "
            f'"import csv, json, sys; [print(json.dumps(r)) for r in csv.DictReader(sys.stdin{delimiter})]" '
            f"< {file.name} > {file.stem}.jsonl"
        )
    found = next((what for magic, what in MAGIC.items() if start.startswith(magic)), None)
    if found is None and b"\0" in start[:256]:
        found = "binary data, or text in UTF-16 or UTF-32 (iconv -f UTF-16 -t UTF-8 converts that)"
    if found:
        raise UserError(f"{file}: is {found}. Rows are JSON in UTF-8, one object a line.")


def is_array(start: bytes) -> bool:
    """Whether a file that begins so is one JSON array of rows, and not lines of which the first is a list."""
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text.startswith(b"["):
        return False
    line, _, following = text.partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not following.strip()


def array(file: Any, path: Path) -> Iterator[Any]:
    """Yields the elements of a JSON array without holding all of it; raises UserError where it is broken."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    decoder = json.JSONDecoder(object_pairs_hook=object_of)
    text, at, number, ended = "", 0, 0, False
    wanted = "["  # what stands next: [, first (a row or the end), row, or the comma after a row

    def broken(problem: str) -> UserError:
        after = f"after row {number}" if number else "before its first row"
        return UserError(f"{path}: is not a whole JSON array ({problem} {after}).")

    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if at == len(text) and not ended:
            pass
        elif at == len(text):
            raise broken("it ends")
        elif wanted != "row":
            if text[at] == "]" and wanted != "[":
                if text[at + 1 :].strip() or file.read(CHUNK).strip():
                    raise UserError(f"{path}: text follows the end of its JSON array.")
                return
            if wanted != "first" and text[at] != wanted:
                raise broken(f"{text[at : at + 20]!r} stands where {wanted!r} is expected")
            at += wanted != "first"
            wanted = "first" if wanted == "[" else "row"
            continue
        else:
            try:
                row, end = decoder.raw_decode(text, at)
                if end < len(text) or ended:  # a number at the end of the text may go on
                    number, at, wanted = number + 1, end, ","
                    yield row
                    continue
            except Twice as error:
                raise broken(f"{error}") from error
            except RecursionError as error:
                raise broken("it is nested too deeply") from error
            except ValueError as error:
                if ended or len(text) - at > LONGEST_ROW:
                    near = text[max(0, getattr(error, "pos", at) - 20) :][:40]
                    raise broken(f"{getattr(error, 'msg', error)} near {near!r}") from error
        try:
            # as much again as there is: a long row is then parsed a few times, not once for every chunk
            block = file.read(max(CHUNK, len(text) - at))
            ended = not block
            text, at = text[at:] + decode(block, final=ended), 0
        except UnicodeDecodeError as error:
            raise broken(f"it is not UTF-8: byte {error.object[error.start : error.start + 1]!r}") from error


class Twice(ValueError):
    """A key that an object names twice; JSON readers silently keep the last one."""


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of JSON with these keys; raises Twice where one comes twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Twice(f"the key {twice!r} comes twice in one object")
    return result
