"""Validation losses are token-weighted over all ranks, also where a task is absent from a batch or a rank."""

from __future__ import annotations

import math

import pytest
import torch

from mft.errors import UserError
from mft.loss.coba import Coba
from mft.objective import criterion
from mft.training.metrics import task_means


def test_coba_takes_the_validation_before_training_as_the_unit_of_its_ratios() -> None:
    loss = Coba(warmup_steps=3, history_length=10, update_interval=1)
    loss.setup(["a", "b"], [1, 1])
    loss.set_initial_losses(torch.tensor([4.0, math.nan], dtype=torch.float64))
    loss.learn(1, valid_K=torch.tensor([3.0, 2.0], dtype=torch.float64))
    loss.learn(2, valid_K=torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert loss.ratios.array().tolist() == [[0.5, 0.5]]  # without a validation the first probe is the unit


def test_absent_is_nan_and_not_finite_is_inf() -> None:
    means = task_means(torch.tensor([[0.0, math.nan, math.inf, 6.0], [0.0, 2.0, 1.0, 3.0]])).tolist()
    assert math.isnan(means[0]) and means[1:] == [math.inf, math.inf, 2.0]


@pytest.mark.parametrize(
    ("best", "expected"), [("mean", 2.0), ("worst", 3.0), ("weighted", 1.5), ("a", 1.0), ("b", 3.0)]
)
def test_what_a_validation_is_judged_by(best: str, expected: float) -> None:
    assert criterion({"a": 1.0, "b": 3.0}, best, {"a": 3.0, "b": 1.0}) == pytest.approx(expected)


def test_a_task_without_validation_samples_cannot_be_the_best() -> None:
    with pytest.raises(UserError, match=r"train\.best=c: this task has no validation samples"):
        criterion({"a": 1.0}, "c", {"a": 1.0, "c": 1.0})
