"""Failures and signals under torchrun, accelerate launch and (a stand-in of) srun; the runs are stand-ins,
too.

The same for the processes of `mft train` itself is in tests/launch/test_spawn.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mft import run_folder
from tests.launch.test_placed import FSDP_CONFIG
from tests.selection import long

REPOSITORY = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"],
    "accelerate": ["accelerate.commands.launch", "--config_file", "{run_dir}/accelerate.yaml", "-m"],
    "srun": ["tests.launch.srun", sys.executable, "-m"],
}


def started(launcher: str, run_dir: Path, entry: str) -> subprocess.Popen[str]:
    (run_dir / "config.yaml").write_text("{}")
    (run_dir / "accelerate.yaml").write_text(FSDP_CONFIG)
    words = [word.format(run_dir=run_dir) for word in LAUNCHERS[launcher]]
    unplaced = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))
    }
    return subprocess.Popen(
        [sys.executable, "-m", *words, "tests.launch.placed", str(run_dir), entry],
        cwd=REPOSITORY,
        env=unplaced
        | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_LOG_LEVEL": "ERROR"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ready(process: subprocess.Popen[str], run_dir: Path) -> list[int]:
    """Waits until both ranks are at work; returns their pids."""
    end = time.monotonic() + 90
    while len(found := list(run_dir.glob("ready*"))) < 2:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate(timeout=60)[0])
        time.sleep(0.05)
    time.sleep(0.2)  # the files are written
    return [int(path.read_text()) for path in found]


def all_gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive := [
        pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"
    ]:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return not alive


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("launcher", ["torchrun", long("accelerate"), "srun"])
def test_the_rank_that_failed_first_is_reported(tmp_path: Path, launcher: str) -> None:
    process = started(launcher, tmp_path, "fail")
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "rank 1 failed: ValueError: this is the cause" in output
    assert 'tests/launch/entries.py", line' in output and "in _together" in output
    assert "ValueError: this is the cause" in (tmp_path / "log" / "rank1.log").read_text()
    assert (tmp_path / "log" / "rank0.log").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_that_failed_does_not_hang_in_its_end(tmp_path: Path) -> None:
    process = started("srun", tmp_path, "fail_and_hang")
    try:
        output = process.communicate(timeout=60)[0]
    finally:
        for task in psutil.Process().children(recursive=True):
            if "tests.launch.placed" in task.cmdline():
                task.kill()
    assert process.returncode == 1 and output.count("data.paths: /nowhere does not exist") >= 1


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("launcher", "signum"), [("torchrun", signal.SIGINT), ("accelerate", signal.SIGTERM)]
)
def test_a_signal_to_the_launcher_lets_the_ranks_save(tmp_path: Path, launcher: str, signum: int) -> None:
    process = started(launcher, tmp_path, "until_stopped")
    pids = ready(process, tmp_path)
    process.send_signal(signum)
    process.communicate(timeout=40)
    assert run_folder.status(tmp_path) == "stopped"
    assert process.returncode != 0 and all_gone(pids, 5)


@pytest.mark.slow
@pytest.mark.dist
def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    process = started("torchrun", tmp_path, "deaf")
    pids = ready(process, tmp_path)
    process.kill()
    assert all_gone(pids, 5)
    process.communicate(timeout=10)
