"""The output of a rank: every rank has a log file, rank 0 the terminal as well."""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mft.console.credentials import hidden
from mft.console.streams import steady

MOVES = re.compile(r"\x1b\[(\d*)A")
"""Moves the cursor up: a progress bar overwrites what it drew before."""

STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")

REDRAWN = 64
"""Lines at the end of a transcript that may still be overwritten."""


class Transcript:
    """A text file with what a terminal shows in the end: without colours, and without what was drawn over."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()  # a progress bar is drawn by a thread of its own
        self._lines: list[str] = [""]  # the last ones, the very last is not ended yet
        self._start = self._file.tell()  # of these lines in the file

    def write(self, text: str) -> None:
        """Appends text as a terminal would: a carriage return starts the line again, cursor-up goes back to a line."""
        with self._lock:
            self._write(text)

    def _write(self, text: str) -> None:
        for part in re.split(r"(\r?\n|\r|\x1b\[\d*A)", text):
            if part in ("\n", "\r\n"):
                self._lines.append("")
            elif part == "\r":
                self._lines[-1] = ""
            elif moved := MOVES.fullmatch(part):
                del self._lines[max(1, len(self._lines) - int(moved[1] or 1)) :]
                self._lines[-1] = ""
            else:
                self._lines[-1] += STYLES.sub("", part)
        self._file.seek(self._start)
        self._file.truncate()
        done = self._lines[:-REDRAWN]
        self._file.write("".join(f"{line}\n" for line in done))
        self._start = self._file.tell()
        self._lines = self._lines[-REDRAWN:]
        self._file.write("\n".join(self._lines))
        self._file.flush()

    def close(self) -> None:
        """Ends the file; what is written afterwards goes to the terminal only."""
        with suppress(OSError):  # what is still to be written, on a full disk
            self._file.close()


def copy(stream: Any, transcript: Transcript) -> None:
    """Writes what goes to a stream to a transcript, too, both without credentials. The stream stays what it is, for
    everybody who holds it.

    A log that cannot be written (a full disk) does not end a run.
    """
    write = stream.write

    def both(text: str) -> Any:
        text = hidden(text)
        with suppress(OSError, ValueError):
            transcript.write(text)
        return write(text)

    stream.write = both


def _hiding(write: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: write(hidden(text))


@contextmanager
def written_to(path: Path, rank: int) -> Iterator[int]:
    """Writes what this process prints to a log file; yields the file descriptor of the terminal's error stream.

    Of ranks above 0 all output goes there, also that of libraries in C, until the process ends. Rank 0 keeps the
    terminal; what Python writes is copied, and what libraries in C write is not.
    """
    if rank > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        terminal = os.dup(2)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        for stream in (sys.stdout, sys.stderr):
            stream.write = _hiding(stream.write)  # type: ignore[method-assign]
        yield terminal
        return
    steady(lasting=True)
    transcript, streams = Transcript(path), (sys.stdout, sys.stderr)
    for stream in streams:
        copy(stream, transcript)
    try:
        yield 2
    except Exception:
        with suppress(OSError):
            transcript.write(hidden(traceback.format_exc()))
        raise
    finally:
        for stream in streams:
            del stream.write
        transcript.close()
