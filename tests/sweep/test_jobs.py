"""Sweeps of real tiny jobs: killed, stopped, failing, ended early, and gone on with."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mft import cli, run_folder
from mft.data.task import FIRST_ROWS
from mft.sweep.folder import sweep_id, taken
from mft.training.checkpoint import newest
from tests.sweeping import FAST, mft, runs, start, states, two_tasks, typed, until, until_nothing_runs

AXES = ["loss=task_token_mean,coba", "optimizer.lr=1e-3,2e-3,3e-3"]
EVERY_TEN = ["train.eval_every=10", "train.save_every=10", "train.log_every=10"]
LONG = [*FAST, "train.epochs=100", "train.max_steps=60", *EVERY_TEN]
"""Jobs of some seconds: long enough to be stopped, or judged, before they end by themselves."""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return two_tasks(tmp_path)


def finished(work: Path) -> dict[str, float]:
    return {
        r.name: (r / "summary.json").stat().st_mtime for r in runs(work) if run_folder.status(r) == "finished"
    }


def validated(run: Path) -> list[int]:
    return [row["step"] for row in run_folder.metric_rows(run / "metrics.jsonl")[0] if "valid/loss" in row]


@pytest.mark.slow
def test_six_jobs_killed_in_the_middle_and_resumed(work: Path) -> None:
    sweep = start(work, "train", "-m", *FAST, *AXES, "launch.jobs=2")
    until(lambda: len(finished(work)) >= 2, sweep)
    sweep.send_signal(signal.SIGKILL)
    sweep.communicate(timeout=60)
    until_nothing_runs(work)
    before = finished(work)
    assert 2 <= len(before) < 6
    code, said = mft(work, "sweep", "resume", "multirun/debug")
    assert code == 0, said
    after = finished(work)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before, "a finished job ran again"
    for run in runs(work):
        assert validated(run) == sorted(set(validated(run)))
    wider = [axis.replace("3e-3", "3e-3,4e-3") for axis in AXES]
    code, said = mft(work, "train", "-m", *FAST, *wider, "--dry-run")
    assert code == 0 and "2 of 8 jobs would run" in said, said


@pytest.mark.slow
def test_ctrl_c_stops_the_sweep_and_its_job_goes_on_from_the_checkpoint(work: Path) -> None:
    given = ["train", "-m", *LONG, "train.seed=1,2"]
    sweep = start(work, *given)
    until(lambda: any(newest(run) is not None for run in runs(work)), sweep)
    sweep.send_signal(signal.SIGINT)
    said = sweep.communicate(timeout=300)[0]
    assert sweep.returncode == 130 and "mft sweep resume" in said, said
    assert states(work) == {"train.seed=1": "stopped"}, "the second job must not have started"
    (run,) = runs(work)
    saved = newest(run)
    assert saved is not None
    code, said = mft(work, *given, "--dry-run")
    assert code == 0 and f"would resume from {saved.name}" in said and "2 of 2 jobs would run" in said, said
    code, said = mft(work, *given)
    assert code == 0, said
    assert states(work) == {"train.seed=1": "finished", "train.seed=2": "finished"}
    assert f"resuming from {saved.name}" in (run / "log" / "output.txt").read_text()
    assert validated(run) == list(range(0, 61, 10)), "a point is missing or doubled"


@pytest.mark.slow
def test_a_failed_job_leaves_its_traceback_and_fail_fast_starts_no_other(work: Path) -> None:
    axis = "optimizer.lr=1e30,1e-3"
    code, said = mft(work, "train", "-m", *FAST, axis, "launch.fail_fast=true")
    assert code == 1 and "1 failed, 1 not started" in said, said
    assert list(states(work).values()) == ["failed"]
    code, said = typed(work, "train", "-m", *FAST, axis)
    assert code == 1 and "of 2 jobs 1 failed;" in said, said
    assert states(work) == {"optimizer.lr=1e+30": "failed", "optimizer.lr=0.001": "finished"}
    failed = next(run for run in runs(work) if run_folder.state(run) == "failed")
    assert "non-finite" in (failed / "log" / "traceback.txt").read_text() and "non-finite" in said
    assert f"{failed.relative_to(work)}/log/traceback.txt" in said


@pytest.mark.slow
@pytest.mark.long
def test_a_job_worse_than_the_median_of_the_others_ends_early(work: Path) -> None:
    given = ["train", "-m", *LONG, "optimizer.lr=1e-3,2e-3,3e-3,1e-9", "scheduler=constant"]
    code, said = mft(work, *given, "launch.prune=true")
    assert code == 0 and "job 4 was pruned: at step" in said and "the median of 3 others" in said, said
    label = "optimizer.lr=1e-09"
    assert states(work)[label] == "pruned" and list(states(work).values()).count("finished") == 3
    code, said = mft(work, *given, "launch.prune=true", "--dry-run")
    assert code == 0 and "0 of 4 jobs would run" in said, said
    code, said = mft(work, *given, "--dry-run")  # without the rule it may go on
    assert code == 0 and "1 of 4 jobs would run" in said and "would resume from step-" in said, said


COUNTING = """
import os
from pathlib import Path
from mft.data.formats import Chat

class Counting(Chat):
    def messages(self, row):
        with open(Path(__file__).with_name("rows-read.txt"), "a") as file:
            file.write(f"{os.getpid()}\\n")
        return super().messages(row)
"""


@pytest.mark.slow
@pytest.mark.long
def test_jobs_side_by_side_tokenise_their_tasks_once(work: Path) -> None:
    (work / "counting.py").write_text(COUNTING)
    (work / "yaml" / "task").mkdir(parents=True)
    task = f"""\
# @package task.docs
defaults:
  - /format@format: chat
  - _self_
_target_: mft.data.task.Task
paths: [{work}/docs]
format:
  _target_: counting.Counting
"""
    (work / "yaml" / "task" / "docs.yaml").write_text(task)
    given = ["debug=fast", "task=[docs]", "train.seed=1,2", "launch.jobs=2", "--plugin", "counting"]
    code, said = mft(work, "train", "-m", "--config-dir", "yaml", *given)
    assert code == 0, said
    readers = (work / "rows-read.txt").read_text().split()
    # the sweep checks each of its two jobs on the first rows; one process tokenises all 60
    assert sorted(Counter(readers).values()) == [2 * FIRST_ROWS, 60]


def test_a_check_of_one_job_starts_nothing(work: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setenv("MFT_CACHE", str(work / "cache"))
    cli.main(["train", *FAST, "--check"])
    said = capsys.readouterr().out
    assert "outputs/debug/" in said and said.endswith(": would run; nothing was started\n")
    assert not (work / "outputs").exists()
    with pytest.raises(SystemExit):
        cli.main(["train", *FAST, "data.seq_length=0", "--check"])
    assert "data.seq_length=0 must be at least 2" in capsys.readouterr().err


def test_adding_values_and_how_jobs_run_move_nothing() -> None:
    assert sweep_id(["a=1", "train.seed=1,2"]) == sweep_id(["train.seed=1,2,3", "a=1", "launch.jobs=2"])
    assert sweep_id(["a=1", "train.seed=1,2"]) != sweep_id(["a=2", "train.seed=1,2"])


def test_the_command_of_a_sweep_keeps_variables_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFT_TEST_STORE", "http://user:S3cr3t@host:9")
    given = "tracking.mlflow.uri=${oc.env:MFT_TEST_STORE}"
    cfg = OmegaConf.create({"sweep": "1", "hydra": {"overrides": {"task": [given], "hydra": []}}})
    with taken(cfg, tmp_path):
        kept = (tmp_path / "sweep.json").read_text()
    assert "S3cr3t" not in kept and given in kept
