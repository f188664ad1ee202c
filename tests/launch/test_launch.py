"""Launching whole jobs: inline, replayed by torchrun, out of memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mft import run_folder
from mft.config import plugins
from mft.errors import UserError
from mft.launch.placement import ranks
from tests.distributed.runs import LAYOUTS, frozen, logged, write_tasks
from tests.tiny_runs import train

REPOSITORY = Path(__file__).parents[2]


def test_inline_runs_in_this_process(
    tmp_path: Path, cache_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    summary, folder = train(tmp_path, cache_dir)
    printed = capfd.readouterr().out
    assert summary["status"] == "finished" and "training" in printed
    assert "training" in (folder / "log" / "rank0.log").read_text()
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(UserError, match=r"launch\.nproc=2"):
        ranks(2, "inline")


def test_memory_that_runs_out_names_what_to_lower(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_named", {"tests": None})
    with pytest.raises(UserError) as caught:
        train(tmp_path, cache_dir, "loss._target_=tests.launch.exhausting.Exhausting", "data.seq_length=64")
    for part in (
        "Memory ran out",
        "train.per_device_batch_size (now ",
        "data.seq_length (now 64)",
        "dist=zero3",
    ):
        assert part in str(caught.value)
    assert run_folder.status(tmp_path / "run") == "failed"


def test_what_the_system_refuses_ends_the_launch(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log").write_text("a file where a folder is to be")
    with pytest.raises(FileExistsError) as caught:
        train(tmp_path, cache_dir)
    assert caught.value.__cause__ is None, "a closed chain: who walks it never comes to an end"


@pytest.mark.long
@pytest.mark.dist
def test_torchrun_replays_a_run(tmp_path: Path) -> None:
    data = f"data.paths=[{','.join(map(str, write_tasks(tmp_path / 'tasks')))}]"
    settings = [*LAYOUTS["pad"], data, f"cache_dir={tmp_path / 'cache'}", "launch.nproc=2", "dist=ddp"]
    folder = frozen(tmp_path / "run", [*settings, "train.max_steps=2", "train.eval_every=null"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "mft.launch.worker", str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert len(logged(folder, "train/loss")) == 2 and run_folder.status(folder) == "finished"
    assert (folder / "log" / "rank1.log").exists() and "training" in done.stdout
