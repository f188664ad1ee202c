"""How a run hears that it is to stop, and the exit codes that say how it stopped.

Ctrl-C (SIGINT), SIGTERM (schedulers, `kill`) and SIGHUP (a closed terminal) ask for a stop: the current step
is finished, a checkpoint saved, and the process exits with one of the codes below.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mft import run_folder
from mft.run_folder import RunStatus

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
        """The signal handler. Later signals change nothing: Ctrl-C reaches a rank twice, by terminal and
        parent."""
        self.signal = self.signal or signum

    def listen(self) -> None:
        """From now on SIGNALS ask this process to stop; one that is ignored (nohup) stays ignored."""
        self.signal = 0
        for name in SIGNALS:
            if signal.getsignal(name) != signal.SIG_IGN:
                signal.signal(name, self.request)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the process is to exit with `code` (see `exit_code`).

    A KeyboardInterrupt, not an Exception, so that nothing on the way (Hydra) mistakes it for one failed job
    of a sweep and starts the next.
    """

    def __init__(self, signum: int, code: int):
        super().__init__(signum, code)
        self.signum = signum
        self.code = code


def exit_code(run_dir: Path, signum: int) -> int:
    """Returns the exit code after a signal: 130 after Ctrl-C, else 75 with and 143 without a checkpoint."""
    if signum == signal.SIGINT:
        return INTERRUPTED
    return SAVED if run_folder.status(run_dir) in (RunStatus.stopped, RunStatus.finished) else UNSAVED


@contextmanager
def handlers(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handles SIGNALS by `handler` inside the block; does nothing outside the main thread.

    A signal that is ignored stays ignored: nohup ignores SIGHUP on purpose.
    """
    try:
        before = {
            name: signal.signal(name, handler) for name in SIGNALS if signal.getsignal(name) != signal.SIG_IGN
        }
    except ValueError:  # signal only works in main thread
        before = {}
    quit_before = signal.getsignal(signal.SIGQUIT)
    try:
        yield
    finally:
        for name, old in before.items():
            signal.signal(name, old)
        if before:
            signal.signal(signal.SIGQUIT, quit_before)  # elastic leaves its own behind
