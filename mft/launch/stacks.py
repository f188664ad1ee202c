"""Where a rank stands: the stacks of all its threads, in its log, when ranks stall, when it dies of a signal,
and on SIGUSR1."""

from __future__ import annotations

import faulthandler
import signal
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_log: TextIO | None = None
"""The log of this rank; kept, since faulthandler holds its file descriptor only."""


def written_to(path: Path) -> None:
    """Lets the stacks of this process be appended to a log.

    NCCL ends a process by SIGABRT when a collective times out: without this, nobody would see where.
    """
    global _log
    _log = path.open("a", encoding="utf-8")
    faulthandler.enable(_log)
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:  # else somebody, such as submitit, waits for it
        faulthandler.register(signal.SIGUSR1, _log)


def dump(reason: object) -> None:
    """Appends the stacks of all threads to the log. reason: the line above them."""
    if _log is not None:
        with suppress(OSError):  # the disk may be full
            _log.write(f"\nStacks of this rank, since {reason}\n")
            _log.flush()
            faulthandler.dump_traceback(_log)
