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

CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
"""Colours, cursor movements and titles, which only a terminal understands."""


class LineLog:
    """A text file of whole lines: without colours, and without what a progress bar draws over.

    A bar is a line that is not ended but started again, by a carriage return; the file gets what is drawn
    last.
    """

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()  # a progress bar is drawn by a thread of its own
        self._line = ""  # not ended yet

    def write(self, text: str) -> None:
        """Appends text as a terminal would."""
        with self._lock:
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
        with suppress(OSError):  # what is still to be written, on a full disk
            self._file.write(self._line)
            self._file.close()


def tee(stream: Any, log: LineLog) -> None:
    """Writes what goes to a stream to a log, too, both without credentials.

    The stream stays the same object, for everybody who holds it. A log that cannot be written (a full disk)
    does not end a run.
    """
    write = stream.write

    def both(text: str) -> Any:
        text = hidden(text)
        with suppress(OSError, ValueError):
            log.write(text)
        return write(text)

    stream.write = both


def _hiding(write: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: write(hidden(text))


@contextmanager
def written_to(path: Path, rank: int) -> Iterator[int]:
    """Writes what this process prints to a log file; yields the file descriptor of the terminal's error
    stream.

    Of ranks above 0 all output goes there, also that of libraries in C, until the process ends. Rank 0 keeps
    the terminal; what Python writes is copied, and what libraries in C write is not.
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
    log, streams = LineLog(path), (sys.stdout, sys.stderr)
    for stream in streams:
        tee(stream, log)
    try:
        yield 2
    except Exception:
        with suppress(OSError):
            log.write(hidden(traceback.format_exc()))
        raise
    finally:
        for stream in streams:
            del stream.write
        log.close()
