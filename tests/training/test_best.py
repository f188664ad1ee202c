"""Which validation is the best, what stalls, and which checkpoint holds the best that can still be had."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mft.batch import StepBatches, StepCounts
from mft.training.best import BestTracker
from mft.training.state import State


def test_improvements_and_stalls_are_counted() -> None:
    best = BestTracker()
    assert best.update(0, {"a": 3.0, "b": 5.0}, 4.0)
    assert not best.update(2, {"a": 2.5, "b": 6.0}, 4.25) and best.stalled == 1
    assert not best.update(4, {"a": 2.6, "b": 5.4}, 4.0) and best.stalled == 2, "equal is no improvement"
    assert best.update(6, {"a": 2.7, "b": 4.0}, 3.35) and best.stalled == 0
    assert (best.step, best.value, best.losses) == (6, 3.35, {"a": 2.7, "b": 4.0})
    assert (best.first, best.last_step) == ({"a": 3.0, "b": 5.0}, 6)
    assert best.task_step == {"a": 2, "b": 6} and best.is_a_tasks_best(2) and not best.is_a_tasks_best(4)


def test_only_validated_steps_count_as_saved() -> None:
    best = BestTracker()
    best.update(2, {"a": 2.0}, 2.0)
    best.mark_saved(3)
    assert best.saved_step == 0
    best.update(4, {"a": 3.0}, 3.0)
    best.mark_saved(4)
    assert (best.saved_step, best.saved_value) == (4, 3.0), "step 2 was better, but has no checkpoint"
    assert best.task_saved_step == {"a": 4} and best.task_step == {"a": 2}


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    best = BestTracker()
    assert not best.update(1, {"a": math.inf}, math.inf) and best.task_step == {}
    assert best.update(2, {"a": 9.0}, 9.0)


def test_a_state_comes_back_from_its_file() -> None:
    state = State(learned={"train/weight/a": 0.5})
    trained_K = torch.tensor([3.0, 4.0])
    counts = StepCounts(trained_K, trained_K, 2.0, processed=12.0, positions=16.0)
    state.advance(StepBatches([], epoch=1, rows_consumed=8, epochs_done=1.25), counts)
    state.best.update(1, {"a": 2.0}, 2.0)
    again = State.from_dict(json.loads(json.dumps(state.as_dict())))
    assert again == state and (again.tokens, again.positions, again.trained) == (12, 16, 7)
    assert (again.step, again.rows_consumed, again.epochs_done) == (1, 8, 1.25)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([], "a list where an object"),
        ({}, "step is missing"),
        ({"step": "1"}, "step is '1'"),
        ({"step": True}, "step is True"),
        ({"best": {"stalled": 1.5}}, "best.stalled is 1.5"),
        ({"best": []}, "best is"),
    ],
)
def test_a_file_of_another_shape_says_what_is_wrong(values: object, problem: str) -> None:
    if isinstance(values, dict) and values:
        values = State().as_dict() | values
    with pytest.raises(ValueError, match=problem):
        State.from_dict(values)
