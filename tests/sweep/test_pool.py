"""What each of several jobs side by side gets of the machine, and how far a job has come."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mft.errors import UserError
from mft.sweep.pool import SweepJob, partition_devices


def test_one_job_gets_everything() -> None:
    assert partition_devices(1) == [([], [])]


def test_cores_and_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert partition_devices(2) == [([0, 1], ["4", "5"]), ([2, 3], ["6", "7"])]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert [cores for cores, _ in partition_devices(3)] == [[0], [1], [0]], "more jobs than cores share them"
    with pytest.raises(UserError, match=r"launch\.jobs=5, but 4 GPUs are visible"):
        partition_devices(5)


class Objective:
    """Stands for a checked job: its objective is valid/loss."""

    def judged(self, row: dict[str, Any]) -> float | None:
        return row.get("valid/loss")


def test_a_job_reads_what_was_logged_since_the_last_time(tmp_path: Path) -> None:
    checked: Any = Objective()
    job, metrics = SweepJob(1, checked, tmp_path), tmp_path / "metrics.jsonl"
    assert not job.update() and job.total_steps == 0
    (tmp_path / "plan.json").write_text('{"total_steps": 30}')
    rows: list[dict[str, Any]] = [
        {"step": 0, "valid/loss": 3.0},
        {"step": 5},
        {"step": 10, "valid/loss": 2.0},
    ]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert job.update() and (job.step, job.total_steps, job.best) == (10, 30, 2.0)
    assert not job.update()
    with metrics.open("a") as file:
        file.write('{"step": 20, "valid/loss": 2.5}\n{"step": 30, "val')  # the last row is not written yet
    assert job.update() and (job.step, job.best) == (20, 2.0)
    assert job.values == {0: 3.0, 10: 2.0, 20: 2.5}
