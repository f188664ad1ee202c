"""Child processes that try things: started with a time limit, and replaced where one dies on the way."""

from __future__ import annotations

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from mft.doctor.attempt import MARK

LIMIT = 60.0
"""Seconds that one attempt may take."""

_running: set[subprocess.Popen[str]] = set()
_starting = threading.Lock()
"""Held while a child is started, and for good once this process ends."""

Answer = dict[str, Any]
"""Of `attempt.main`: name, and found or error."""


def answers(
    names: Sequence[str], given: Mapping[str, Mapping[str, Any]], seconds: float = LIMIT
) -> Iterator[Answer]:
    """Yields an answer for each attempt, in this order: those of one child follow each other in it.

    given: arguments of attempts by name; seconds: the limit of one attempt. An attempt that ends or silences
    its process has that as its error, and a new child goes on with the next one.
    """
    waiting = list(names)
    while waiting:
        with tempfile.TemporaryFile() as errors:
            with _starting:
                process = _start(waiting, given, errors)
                _running.add(process)
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
            ended = ""
            try:
                while waiting and not ended:
                    try:
                        line = lines.get(timeout=seconds)
                    except queue.Empty:
                        ended = f"no answer in {seconds:g} s"
                        continue
                    if line is None:
                        ended = f"its process {_how_it_ended(process.wait(), errors)}"
                    elif line.startswith(MARK):
                        waiting.pop(0)
                        yield json.loads(line.removeprefix(MARK))
            finally:
                _end(process)
                _running.discard(process)
        if waiting:
            yield {"name": waiting.pop(0), "error": ended}


def _start(
    names: Sequence[str], given: Mapping[str, Mapping[str, Any]], errors: IO[bytes]
) -> subprocess.Popen[str]:
    # The same places to import from as here, and not the current folder, which -m would put first.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mft.doctor.attempt", *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # so that its own ranks can be ended with it
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as file:  # on standard input, which nobody else can read
        json.dump(given, file)
    return process


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _how_it_ended(code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    said = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    last = f": {said[-1].strip()[:200]}" if said else ""
    if code < 0:
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}{last}"
    return f"ended with code {code}{last}"


@atexit.register
def _end_all() -> None:
    """Ends the children: after Ctrl-C the threads that wait for them are stopped without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the second Ctrl-C of an impatient person
    _starting.acquire()
    for process in [*_running]:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
