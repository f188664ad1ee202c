"""Time and memory of a run by phase, over its parts."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mft.training.phases import Phase, Phases


def rank(number: int = 0, world: int = 1) -> Any:
    return SimpleNamespace(gather=lambda value: [value] * world, world=world, rank=number)


def part(training: float, peak: int, waited: float = 0.0, device_seconds: float = 0.0) -> dict[str, Any]:
    return {
        "seconds": {"training": training, "loading": 1.0},
        "peaks": {"training": [peak]},
        "resets": True,
        "waited": waited,
        "device_seconds": device_seconds,
    }


def test_each_moment_is_of_one_phase() -> None:
    phases = Phases()
    phases.enter(Phase.training)
    with phases.during(Phase.saving), phases.during(Phase.validation):
        time.sleep(0.05)
    assert phases.phase is Phase.training
    (state,) = phases.state(rank())
    assert 0.05 <= state["seconds"]["validation"] < 0.5 and state["seconds"]["saving"] < 0.05
    assert sum(state["seconds"].values()) == pytest.approx(phases.total(), abs=0.05)
    assert state["device_seconds"] == state["seconds"]["training"]
    phases.measure(torch.device("cpu"))
    assert set(state["peaks"]) == {"data", "training", "saving", "validation"}


def test_what_is_waited_for_is_the_next_step() -> None:
    def steps() -> Any:
        yield 1
        time.sleep(0.1)
        yield 2

    phases = Phases()
    for _ in phases.awaited(steps()):
        time.sleep(0.1)
    assert 0.1 <= phases.waited < 0.19


def test_a_resumed_run_has_the_time_of_all_its_parts() -> None:
    phases = Phases(Phase.training)
    phases.resume([part(10, 5), part(20, 1 << 60, 3.0, 40.0)], 33.0, rank(1, world=2))
    state = phases.state(rank(1, world=2))[1]
    assert state["seconds"]["training"] == pytest.approx(20, abs=0.1) and state["seconds"]["loading"] == 1
    assert state["peaks"]["training"] == [1 << 60] and state["waited"] == 3
    assert state["device_seconds"] == pytest.approx(0, abs=0.1), "of the first rank, the same on all"
    assert 33 <= phases.total() < 34


def test_memory_of_a_gpu_is_not_that_of_a_process() -> None:
    phases = Phases(Phase.training)
    on_gpu = part(10, 5) | {"peaks": {"training": [1 << 60, 1 << 61]}}
    phases.resume([on_gpu], 33.0, rank())
    (state,) = phases.state(rank())
    assert len(state["peaks"]["training"]) == 1 and state["peaks"]["training"][0] < 1 << 50
    assert state["seconds"]["training"] >= 10


def test_on_another_number_of_ranks_each_has_the_most_of_all() -> None:
    phases = Phases(Phase.training)
    phases.resume([part(10, 5, 4.0, 30.0), part(20, 1 << 60, 3.0, 30.0)], 33.0, rank())
    time.sleep(0.05)
    (state,) = phases.state(rank())
    assert state["seconds"]["training"] == pytest.approx(20, abs=0.5) and state["waited"] == 4
    assert state["peaks"]["training"] == [1 << 60]
    assert 30.05 <= state["device_seconds"] < 31, "two ranks before, one since"
