"""The median rule: which job of a sweep ends early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mft.run_folder import RunStatus
from mft.sweep.pool import SweepJob, should_prune


def job(number: int, values: dict[int, float], state: RunStatus = RunStatus.running) -> SweepJob:
    checked: Any = None  # its config has no part in the rule
    return SweepJob(number, checked, Path(), state, values=values)


OTHERS = [
    job(2, {10: 3.0, 20: 2.0}),
    job(3, {10: 3.0, 20: 2.2}),
    job(4, {10: 2.9, 20: 2.6}, RunStatus.finished),
]


def test_a_job_behind_the_median_of_three_others_at_its_step_is_pruned() -> None:
    behind = job(1, {0: 9.0, 10: 3.1, 20: 2.3})
    reason = "at step 20 its best is 2.3000, the median of 3 others 2.2000"
    assert should_prune(behind, [behind, *OTHERS], validations=2) == reason


def test_a_job_at_the_median_or_before_its_validations_goes_on() -> None:
    at = job(1, {10: 3.1, 20: 2.2})
    assert should_prune(at, [at, *OTHERS], validations=2) == ""
    early = job(1, {0: 9.0, 10: 9.0})  # the validation before the first step does not count
    assert should_prune(early, [early, *OTHERS], validations=2) == ""
    assert should_prune(early, [early, *OTHERS], validations=1) != ""


def test_its_best_counts_not_its_newest() -> None:
    once_good = job(1, {10: 1.9, 20: 9.0})
    assert should_prune(once_good, [once_good, *OTHERS], validations=1) == ""


def test_fewer_than_three_others_that_came_as_far_decide_nothing() -> None:
    behind = job(1, {10: 9.0, 20: 9.0})
    assert should_prune(behind, [behind, *OTHERS[:2]], validations=1) == ""
    shorter, same = job(5, {10: 1.0}), job(6, {10: 1.0, 20: 1.0}, RunStatus.same)
    assert should_prune(behind, [behind, *OTHERS[:2], shorter, same], validations=1) == ""


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    others = [*OTHERS, job(5, {10: 3.0, 20: 2.4})]
    behind, before = job(1, {20: 2.31}), job(1, {20: 2.29})
    assert "the median of 4 others 2.3000" in should_prune(behind, [behind, *others], validations=1)
    assert should_prune(before, [before, *others], validations=1) == ""
