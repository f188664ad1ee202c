"""Sweeps of real tiny jobs for tests: commands in a folder of its own with two tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mft import run_folder
from mft.files.json_file import read_json
from tests import forked

FAST = ["debug=fast", "train.save_every=2", "train.max_steps=6", "data.paths=[docs,code]"]


def two_tasks(folder: Path) -> Path:
    """Writes the tasks docs and code, 60 short rows each, into a folder; returns it."""
    for task in ("docs", "code"):
        rows = []
        for number in range(60):
            turns = [{"role": "human", "content": task}, {"role": "bot", "content": f"{number} = n " * 9}]
            rows.append(json.dumps({"chat_rounds": turns}))
        (folder / task).mkdir(parents=True)
        (folder / task / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def start(work: Path, *args: str) -> forked.Command:
    """Starts `mft *args` in a folder, with a cache of its own; forked, see `tests.forked`."""
    return forked.Command(work, args, environment(work), [str(work)])


def typed(work: Path, *args: str) -> tuple[int, str]:
    """Runs `mft *args` as a person types it; returns the exit code and all it said."""
    env = environment(work)
    env["PYTHONPATH"] = f"{work}{os.pathsep}{env.get('PYTHONPATH', '')}"  # components of a user's own
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "mft.cli", *args]
    done = subprocess.run(
        command, cwd=work, env=env, text=True, stdout=pipe, stderr=subprocess.STDOUT, timeout=600
    )
    return done.returncode, done.stdout


def environment(work: Path) -> dict[str, str]:
    """Returns the environment of a command in a folder, with a cache of its own."""
    return os.environ | {"MFT_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}


def mft(work: Path, *args: str) -> tuple[int, str]:
    """Runs `mft *args` to its end; returns the exit code and all it said."""
    process = start(work, *args)
    output = process.communicate(timeout=600)[0]
    return process.returncode, output


def until(true: Callable[[], bool], process: forked.Command, seconds: float = 300) -> None:
    """Waits for something to be so while a process lives; fails with what it said otherwise."""
    deadline = time.monotonic() + seconds
    while not true():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate(timeout=60)[0])
        time.sleep(0.1)


def until_nothing_runs(work: Path, seconds: float = 60) -> None:
    """Waits until supervisors and ranks have seen that the sweep's process was killed."""
    deadline = time.monotonic() + seconds
    while "running" in states(work).values():
        assert time.monotonic() < deadline, "something lives on"
        time.sleep(0.2)


def runs(work: Path) -> list[Path]:
    """Returns the folders of all jobs, oldest first."""
    return run_folder.runs_under(work / "multirun")


def states(work: Path) -> dict[str, str]:
    """Returns {label: state} of all jobs."""
    return {read_json(run / "overrides.json")["label"]: run_folder.state(run) for run in runs(work)}
