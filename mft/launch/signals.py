"""How a run is asked to stop, and the exit codes that say how it stopped.

Ctrl-C (SIGINT), SIGTERM (schedulers, `kill`) and SIGHUP (a closed terminal) ask for a stop: the current step
is finished, a checkpoint saved, and the process exits with one of the codes below.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mft.run_folder import RunStatus, status

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a run to stop."""

SAVED = 75
"""Exit code (EX_TEMPFAIL): stopped with a checkpoint; the same command resumes."""
INTERRUPTED = 130
"""Exit code: Ctrl-C."""
UNSAVED = 143
"""Exit code: stopped by a signal before there was anything to save."""


class Stop:
    """Whether this process was asked to stop. The training loop calls it every step; a signal sets it."""

    def __init__(self) -> None:
        self.signal = 0
        """The first signal that asked, 0: none."""

    def __call__(self) -> bool:
        return bool(self.signal)

    def request(self, signum: int, frame: FrameType | None = None) -> None:
        """The signal handler. Later signals change nothing: Ctrl-C reaches a rank twice, from the terminal
        and from its parent."""
        self.signal = self.signal or signum

    def listen(self) -> None:
        """Makes SIGNALS ask this process to stop; one that is ignored (nohup) stays ignored."""
        self.signal = 0
        for name in _handled():
            signal.signal(name, self.request)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the process is to exit with `code` (see `exit_code`).

    A KeyboardInterrupt, not an Exception, so that Hydra does not take it for one failed job of a sweep and
    start the next.
    """

    def __init__(self, signum: int, code: int):
        super().__init__(signum, code)
        self.signum = signum
        self.code = code


def exit_code(run_dir: Path, signum: int) -> int:
    """Returns the exit code after a signal: 130 after Ctrl-C, else 0 where the run finished nevertheless, 75
    with and 143 without a checkpoint.

    A run that finished is not to be resumed: the same command would train it again, from the start.
    """
    if signum == signal.SIGINT:
        return INTERRUPTED
    return {RunStatus.finished: 0, RunStatus.stopped: SAVED}.get(status(run_dir), UNSAVED)


@contextmanager
def handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles SIGNALS by `handler` inside the block; does nothing outside the main thread."""
    try:
        before = {name: signal.signal(name, handler) for name in _handled()}
    except ValueError:  # signal only works in main thread
        before = {}
    quit_before = signal.getsignal(signal.SIGQUIT)
    try:
        yield
    finally:
        for name, old in before.items():
            signal.signal(name, old)
        if before:
            signal.signal(signal.SIGQUIT, quit_before)  # elastic's agent does not restore it


@contextmanager
def held_back() -> Iterator[None]:
    """Lets no signal of SIGNALS through inside the block, nor ever to a process that is started in it: there
    and in what is forked from it they wait until `let_through`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through() -> None:
    """Makes a process that was forked from one started in `held_back` receive SIGNALS, those that wait
    first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def first_signal(act: Callable[[int], None]) -> Iterator[list[int]]:
    """Inside the block the first of SIGNALS calls act(signum), a second one ends this process at once.

    At once is safe for a process whose children watch it: they end when it is gone. Yields the signals so
    far.
    """
    received: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)
        act(signum)

    with handlers(receive):
        yield received


def _handled() -> list[signal.Signals]:
    """Returns SIGNALS without those that are ignored: nohup ignores SIGHUP on purpose."""
    return [name for name in SIGNALS if signal.getsignal(name) != signal.SIG_IGN]
