"""The output of a rank: every rank has a log file, rank 0 the terminal as well."""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mft.console import credentials, streams

CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
"""Colours, cursor movements and titles, which only a terminal understands."""


class LineLog:
    """A text file of complete lines: without colours, and without what a progress bar draws over.

    A bar restarts its line with a carriage return instead of ending it; the file gets the last drawing.
    """

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()  # a progress bar is drawn by another thread
        self._line = ""
        """The last line, not ended yet."""

    def write(self, text: str) -> None:
        """Appends text as a terminal would."""
        with self._lock:
            # the capturing group keeps the line ends among the parts
            for part in re.split(r"(\r?\n|\r)", CONTROLS.sub("", text)):
                if part in ("\n", "\r\n"):
                    self._file.write(f"{self._line}\n")
                    self._file.flush()
                if part in ("\n", "\r\n", "\r"):
                    self._line = ""
                else:
                    self._line += part

    def close(self) -> None:
        """Ends the file; what is written afterwards goes to the terminal only."""
        with suppress(OSError):  # the disk may be full
            self._file.write(self._line)
            self._file.close()


def tee(stream: TextIO, log: LineLog | None = None) -> None:
    """Hides credentials in what is written to a stream, and copies it to a log.

    The stream stays the same object, for everybody who holds it. A log that cannot be written (a full disk)
    does not end a run.
    """
    # rich and logging hold the stream itself, so its method is replaced rather than sys.stdout
    write = stream.write

    def write_hidden(text: str) -> int:
        text = credentials.hidden(text)
        if log is not None:
            with suppress(OSError, ValueError):
                log.write(text)
        return write(text)

    stream.write = write_hidden  # type: ignore[method-assign]


def redirect(path: Path) -> None:
    """Appends all further output of this process to a file, also that of libraries in C."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


@contextmanager
def written_to(path: Path, rank: int) -> Iterator[int]:
    """Writes what this process prints to a log file; yields the file descriptor of the terminal's error
    stream.

    Of ranks above 0 all output goes there until the process ends. Rank 0 keeps the terminal; what Python
    writes is copied, and what libraries in C write is not.
    """
    if rank > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        terminal = os.dup(2)
        redirect(path)
        tee(sys.stdout)
        tee(sys.stderr)
        yield terminal
        return
    streams.steady(lasting=True)
    log, outputs = LineLog(path), (sys.stdout, sys.stderr)  # after `steady`, which may replace them
    for stream in outputs:
        tee(stream, log)
    try:
        yield 2
    except Exception:
        with suppress(OSError):
            log.write(credentials.hidden(traceback.format_exc()))
        raise
    finally:
        for stream in outputs:
            del stream.write
        log.close()
