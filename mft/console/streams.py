"""Standard output and error that never end a command: characters that a terminal lacks are replaced, a closed
stream is ignored."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""What writing answers when the reader of a pipe, or the terminal, is no longer there."""

CLOSED_PIPE = 141
"""Exit code of a command that nobody reads any more: 128 + SIGPIPE, as of other programs."""


class Lasting(io.FileIO):
    """A file descriptor for writing; where its reader disappears, what is written goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in GONE:
                raise
            _to_nowhere(self.fileno())
            return len(data)


def steady(lasting: bool) -> None:
    """Makes this process's standard streams take any text. lasting: continue where their reader disappears.

    Streams that were closed when the process started write nowhere, and those that somebody put in place of
    the process's own stay as they are.
    """
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: `mft runs >&-`
            _to_nowhere(descriptor)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):
            if lasting and not isinstance(getattr(stream.buffer, "raw", None), Lasting):
                stream.flush()
                raw = Lasting(descriptor, "w", closefd=False)
                stream = io.TextIOWrapper(
                    io.BufferedWriter(raw), stream.encoding, "replace", line_buffering=stream.line_buffering
                )
                setattr(sys, name, stream)
                setattr(sys, f"__{name}__", stream)
            stream.reconfigure(errors="replace")


def unread() -> None:
    """Ends a command whose output nobody reads any more."""
    for descriptor in (1, 2):
        _to_nowhere(descriptor)
    sys.exit(CLOSED_PIPE)


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
