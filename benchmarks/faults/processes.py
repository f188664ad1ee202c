"""Commands of mft as processes: started, struck, waited for, and searched for what they leave behind.

Most are forked from a server that has the imports done, which saves seconds a fault; the others are what a
person types, `python -m mft.cli`. Linux only: processes are found in /proc by their working folder.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mft.launch.spawn import PRELOAD

POLL_SECONDS = 0.002
"""How often a moment is looked for: a save of a tiny run takes 20 to 50 ms."""

CONTEXT = multiprocessing.get_context("forkserver")


VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "COLUMNS": "400",
}
"""The environment of every command besides this process's own."""


def prepare_server() -> None:
    """Sets what the fork server imports; it starts with the first command."""
    more = ("mft.launch.launch", "mft.commands.train", "mft.config.compose", "deepspeed", "pandas")
    CONTEXT.set_forkserver_preload([*PRELOAD, *more])


class Command:
    """One command of mft in a working folder; what it prints goes to a file."""

    def __init__(
        self,
        arguments: Sequence[str],
        work: Path,
        output: Path,
        variables: Mapping[str, str],
        typed: bool = False,
        prepare: Callable[[], None] | None = None,
    ):
        """typed: through `python -m mft.cli` rather than forked; prepare: called in the process first, where
        it is forked."""
        self.work, self.output = work, output
        self._typed, self._forked, variables = None, None, VARIABLES | dict(variables)
        if typed:
            command = [sys.executable, "-m", "mft.cli", *arguments]
            with output.open("wb") as file:
                self._typed = subprocess.Popen(
                    command, cwd=work, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            self.pid = self._typed.pid
        else:
            target = (list(arguments), str(work), str(output), dict(variables), prepare)
            self._forked = CONTEXT.Process(target=_forked_command, args=target)
            self._forked.start()
            self.pid = self._forked.pid or 0
            self.until(output.exists)  # before, it is still the fork server's, which ignores Ctrl-C
        self.started = time.monotonic()

    def code(self) -> int | None:
        """Returns the exit code, negative for a signal, None while it runs."""
        return self._typed.poll() if self._typed else self._forked.exitcode if self._forked else None

    def seconds(self) -> float:
        """Returns the time since it was started."""
        return time.monotonic() - self.started

    def wait(self, seconds: float) -> int | None:
        """Returns the exit code, None where it has not ended after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.code() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.code()

    def until(self, true: Callable[[], bool], seconds: float = 120.0) -> bool:
        """Waits for something to be so while the command runs; returns whether it was."""
        deadline = time.monotonic() + seconds
        while not true():
            if self.code() is not None or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def text(self) -> str:
        """Returns what it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def ranks(self) -> dict[int, int]:
        """Returns {rank: process id} of those that have begun their log."""
        found = {}
        for pid in members(self.work):
            for path in _open_files(pid):
                if path.endswith(".log") and "/log/rank" in path and pid != self.pid:
                    found[int(path.rpartition("/rank")[2].removesuffix(".log"))] = pid
        return found

    def send(self, signum: int, *pids: int) -> None:
        """Sends a signal to processes, to the launching one by default; those that have ended are skipped."""
        for pid in pids or (self.pid,):
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def send_group(self, signum: int) -> None:
        """Sends a signal to the whole process group, as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signum)


def members(work: Path) -> list[int]:
    """Returns the processes that work in a folder or have a file open there, whoever started them."""
    found, inside = [], str(work)
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text()
            if stat.rpartition(")")[2].split()[0] in "ZX":  # ended
                continue
            places = [os.readlink(f"/proc/{entry}/cwd"), *_open_files(int(entry))]
        except OSError:
            continue
        if any(place == inside or place.startswith(f"{inside}/") for place in places):
            found.append(int(entry))
    return found


def end_all(work: Path) -> None:
    """Kills every process of a folder."""
    deadline = time.monotonic() + 30
    while (pids := members(work)) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _open_files(pid: int) -> list[str]:
    paths = []
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                paths.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return paths


def _forked_command(
    arguments: list[str],
    work: str,
    output: str,
    variables: dict[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from mft import cli

    os.chdir(work)
    os.environ.update(variables)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    if prepare:
        prepare()
    cli.main(arguments)
