"""`mft` commands forked from a server that has the imports done: seconds cheaper each than `python -m mft.cli`.

All of a command is as it is when typed, but for its start: it finds its imports done. So it forks its ranks from
itself, and the jobs of a sweep from the same server, where a typed one starts a fork server of its own for both.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.launch import spawn
from mft.launch.signals import let_through

MORE = (
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "mft.commands.train",
    "deepspeed",
    "mlflow",
    "pandas",
)
"""What the ranks and commands of tests import beside spawn.PRELOAD."""

CONTEXT: Any = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Starts this process's fork server, unless it runs, without waiting for its imports."""
    spawn.start_fork_server((*spawn.PRELOAD, *MORE))


class Command:
    """A command in a working folder, with the methods of subprocess.Popen; output and errors are one text."""

    def __init__(
        self,
        work: Path,
        args: Sequence[str],
        env: Mapping[str, str],
        path: Sequence[str] = (),
        main: Callable[[list[str]], None] | None = None,
    ):
        """path: goes to the front of sys.path, as PYTHONPATH would; main: what is called with args in place of
        `mft`."""
        start_server()
        self.args = args
        self._output = tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace")  # noqa: SIM115
        given = (list(args), str(work), dict(env), list(path), self._output.name, main)
        self._process = CONTEXT.Process(target=_main, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        self._output.seek(0)
        return self._output.read(), None

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def as_started_by_hand() -> None:
    """Makes of this process, forked from the server, one that listens to Ctrl-C and asks the same server for
    processes. Its ranks it forks from itself, as any process that has the imports done."""
    gc.freeze()
    let_through()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    server: Any = multiprocessing.forkserver
    server.ensure_running = server._forkserver.ensure_running = lambda: None


def _main(
    args: list[str],
    work: str,
    env: dict[str, str],
    path: list[str],
    output: str,
    main: Callable[[list[str]], None] | None,
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    os.chdir(work)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [work, *path]
    as_started_by_hand()
    from mft import cli

    sys.argv = [cli.__file__, *args]
    try:
        (main or cli.main)(args)
    except Exception:  # multiprocessing would print it itself, past mft's hook
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
