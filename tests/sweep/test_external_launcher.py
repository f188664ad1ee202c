"""Sweeps through the launcher of another package: submitit's local executor, as SLURM's without SLURM."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mft import cli, run_folder
from tests.sweeping import FAST, mft, runs, states, two_tasks

SUBMITIT = importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is not None


@pytest.mark.slow
@pytest.mark.skipif(not SUBMITIT, reason='needs pip install "mft[slurm]"')
@pytest.mark.long
def test_submitit_runs_the_jobs_of_a_sweep_and_only_what_is_left(tmp_path: Path) -> None:
    work = two_tasks(tmp_path)
    given = ["train", "-m", *FAST, "optimizer.lr=1e30,1e-3"]
    code, said = mft(work, *given, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10")
    assert code == 1 and "of 2 jobs 1 failed;" in said, said
    assert states(work) == {"optimizer.lr=1e+30": "failed", "optimizer.lr=0.001": "finished"}
    (failed,) = [run for run in runs(work) if run_folder.state(run) == "failed"]
    assert "non-finite" in (failed / "log" / "traceback.txt").read_text() and "non-finite" in said
    code, said = mft(work, *given, "--dry-run")  # the folders are those of any other way to run this sweep
    assert code == 0 and "1 of 2 jobs would run" in said and "(failed before)" in said, said
    code, said = mft(work, *given[:-1], "optimizer.lr=1e-3,2e-3", "hydra/launcher=submitit_local")
    assert code == 0 and "finished before" in said and len(runs(work)) == 3, said


def test_launchers_that_do_not_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for launcher, part in (("ray_aws", "hides GPUs"), ("submitit_slurm", 'pip install "mft[slurm]"')):
        with pytest.raises(SystemExit):
            cli.main(["train", "-m", *FAST, "train.seed=1,2", f"hydra/launcher={launcher}"])
        said = capsys.readouterr().err
        assert said.startswith(f"mft: hydra/launcher={launcher}") and part in said
