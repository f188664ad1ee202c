"""Sweeps through the launcher of another package: submitit's local executor, as SLURM's without SLURM."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft import rundir
from tests.sweeping import FAST, mft, runs, states, two_tasks

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")


@pytest.mark.slow
def test_submitit_runs_the_jobs_of_a_sweep_and_only_what_is_left(tmp_path: Path) -> None:
    work = two_tasks(tmp_path)
    given = ["train", "-m", *FAST, "optimizer.lr=1e30,1e-3"]
    code, said = mft(work, *given, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10")
    assert code == 1 and "of 2 jobs 1 failed;" in said, said
    assert states(work) == {"optimizer.lr=1e+30": "failed", "optimizer.lr=0.001": "finished"}
    (failed,) = [run for run in runs(work) if rundir.state(run) == "failed"]
    assert "non-finite" in (failed / "log" / "traceback.txt").read_text() and "non-finite" in said
    code, said = mft(work, *given, "--dry-run")  # the folders are those of any other way to run this sweep
    assert code == 0 and "1 of 2 jobs would run" in said and "(failed before)" in said, said
    code, said = mft(work, *given[:-1], "optimizer.lr=1e-3,2e-3", "hydra/launcher=submitit_local")
    assert code == 0 and "finished before" in said and len(runs(work)) == 3, said
