"""Sweeps of real tiny jobs: killed and resumed, failing, side by side, listed, compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mft import rundir
from mft.compare import Group, Run, verdicts
from mft.sweep import sweep_id

FAST = ["debug=fast", "train.save_every=2", "train.max_steps=6", "data.paths=[docs,code]"]
AXES = ["loss=task_token_mean,coba", "optimizer.lr=1e-3,2e-3,3e-3", "train.seed=1,2"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for task in ("docs", "code"):
        chat = [{"role": "human", "content": task}, {"role": "bot", "content": "x = 1 " * 8}]
        rows = [json.dumps({"chat_rounds": [*chat[:1], {**chat[1], "content": f"{n} = n " * 9}]}) for n in range(60)]
        (tmp_path / task).mkdir()
        (tmp_path / task / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def start(work: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mft.cli", *args]
    env = os.environ | {"MFT_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=work, env=env, text=True, stdout=pipe, stderr=subprocess.STDOUT)


def mft(work: Path, *args: str) -> tuple[int, str]:
    process = start(work, *args)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def finished(work: Path) -> dict[str, float]:
    runs = rundir.runs_under(work / "multirun")
    return {r.name: (r / "summary.json").stat().st_mtime for r in runs if rundir.status(r) == "finished"}


@pytest.mark.slow
def test_twelve_jobs_killed_in_the_middle_and_resumed(work: Path) -> None:
    sweep = start(work, "train", "-m", *FAST, *AXES, "launch.jobs=2")
    deadline = time.monotonic() + 200
    while len(finished(work)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    sweep.send_signal(signal.SIGKILL)
    sweep.communicate()
    time.sleep(2)  # supervisors and ranks see it gone
    runs = rundir.runs_under(work / "multirun")
    assert not [run for run in runs if rundir.state(run) == "running"], "something lives on"
    before = finished(work)
    assert 4 <= len(before) < 12
    code, said = mft(work, "sweep", "resume", "multirun/debug")
    assert code == 0, said
    after = finished(work)
    assert len(after) == 12
    assert {name: after[name] for name in before} == before, "a finished job ran again"
    for run in rundir.runs_under(work / "multirun"):
        steps = [row["step"] for row in rundir.rows_from(run / "metrics.jsonl")[0] if "valid/loss" in row]
        assert steps == sorted(set(steps))
    (report,) = (work / "multirun").glob("*/*/report.html")
    text = report.read_text()
    assert "<script" not in text and "http://" not in text and "https://" not in text and "data:image/png" in text
    wider = [axis.replace("3e-3", "3e-3,4e-3") for axis in AXES]
    code, said = mft(work, "train", "-m", *FAST, *wider, "--dry-run")
    assert code == 0 and "4 of 16 jobs would run" in said, said


@pytest.mark.slow
def test_a_failed_job_is_told_and_the_others_run(work: Path) -> None:
    code, said = mft(work, "train", "-m", *FAST, "optimizer.lr=1e30,1e-3")
    assert code == 1 and "1 failed" in said, said
    states = {rundir.state(run): run for run in rundir.runs_under(work / "multirun")}
    assert set(states) == {"failed", "finished"}
    assert (states["failed"] / "log" / "traceback.txt").read_text()


def test_adding_values_and_how_jobs_run_move_nothing() -> None:
    assert sweep_id(["a=1", "train.seed=1,2"]) == sweep_id(["train.seed=1,2,3", "a=1", "launch.jobs=2"])
    assert sweep_id(["a=1", "train.seed=1,2"]) != sweep_id(["a=2", "train.seed=1,2"])


def group(name: str, *losses: float) -> Group:
    runs = [Run(name, {}, [{"step": 1, "valid/loss/a": loss}], "finished") for loss in losses]
    return Group({"loss": name}, runs, "mean")


def test_a_winner_is_named_only_where_seeds_tell_it_apart() -> None:
    assert "No winner" in verdicts([group("a", 1.0), group("b", 9.0)])[1]
    assert "No winner" in verdicts([group("a", 1.0), group("b", 9.0, 9.1)])[1]
    assert "No winner" in verdicts([group("a", 1.0, 1.2), group("b", 1.1, 1.3)])[1]
    words, told = verdicts([group("a", 1.0, 1.01), group("b", 2.0, 2.01)])
    assert words == ["lowest", "higher"] and "lower than all others" in told
