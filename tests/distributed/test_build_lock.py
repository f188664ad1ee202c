"""DeepSpeed's op for CPUs is built after a killed process, too: what guarded its build is removed, if nobody
has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mft.distributed.build_lock import remove_abandoned

LOAD = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
from pathlib import Path
from torch.utils.cpp_extension import _get_build_directory
left = Path(_get_build_directory("deepspeed_shm_comm", False)) / "lock"
left.touch()
from mft.distributed import build_lock
build_lock.load()
from deepspeed.ops.op_builder.builder import OpBuilder
print("loaded", *OpBuilder._loaded_ops)
"""


def test_a_guard_stays_while_its_process_lives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = tmp_path / "lock"
    with guard.open("w"):
        remove_abandoned(guard)
        assert guard.exists()
    remove_abandoned(guard)
    assert not guard.exists()
    assert f"removed stale build lock {guard}" in caplog.text
    remove_abandoned(guard)  # none there


def test_what_a_killed_process_left_is_no_reason_to_wait() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded deepspeed_shm_comm"
