"""Text on its way to a terminal: no control sequence of data reaches it, and no password."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from mft.console.credentials import hidden
from mft.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def shown(text: object) -> str:
    """Returns text as a terminal may have it: control characters as \\x1b, credentials as ***."""
    return printable(hidden(str(text)))


def say(text: object = "", file: TextIO | None = None) -> None:
    """Prints a line."""
    print(shown(text), file=file or sys.stdout, flush=True)


PLAIN_WIDTH = 160
"""Columns of output that is not a terminal, such as a log file."""


def console(**options: Any) -> Console:
    """Returns a Console of rich whose text is `shown`, and in which brackets are no markup.

    It is as wide as the terminal, or as COLUMNS in the environment says; else PLAIN_WIDTH columns.
    """
    result = _screen()(**{"markup": False, "highlight": False} | options)
    known = "width" in options or os.environ.get("COLUMNS", "").isdigit()
    if not result.is_terminal and not known:
        result.width = PLAIN_WIDTH
    return result


@functools.cache
def _screen() -> type[Console]:
    from rich.console import Console
    from rich.segment import Segment

    class Screen(Console):
        def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                # Most segments are plain text, for which the patterns of `shown` would only cost time.
                plain = segment.control or (segment.text.isascii() and segment.text.isprintable())
                yield (
                    segment
                    if plain and "@" not in segment.text
                    else segment._replace(text=shown(segment.text))
                )

    return Screen


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def guard_logs() -> None:
    """Makes warnings, log lines and tracebacks of this process `shown`, those of libraries as well."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Shown())
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _traceback
    plain = warnings.formatwarning
    # Every command calls this, and tests run several in one process: it is wrapped once.
    if getattr(plain, "__name__", "") != "_formatted":

        def _formatted(*arguments: Any, **options: Any) -> str:
            return shown(plain(*arguments, **options))

        warnings.formatwarning = _formatted


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, trace)).rstrip(), sys.stderr)
