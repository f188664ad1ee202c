"""What a rank records of its steps, and the signal by which a traced run stops."""

from __future__ import annotations

import signal
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch

from mft.batch import Batch, StepBatches, StepCounts
from mft.launch.signals import Stop, handlers
from mft.training.state import State
from mft.training.trace import Trace, digest, read

NAMES = ("ids_BT", "target_BT", "task_BT", "sample_BT", "position_BT")


def batch(seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return Batch(*(torch.randint(9, (2, 4), generator=draw) for _ in NAMES))


class Source:
    def steps(self, epoch: int, rows_consumed: int, count: int) -> Generator[StepBatches]:
        for number in range(rows_consumed, rows_consumed + count):
            yield StepBatches([batch(number)], epoch, number + 1, 0.0)


def test_a_digest_tells_any_number_and_the_order_apart() -> None:
    one, two = batch(1), batch(2)
    assert digest([one, two]) == digest([batch(1), batch(2)]) != digest([two, one])
    others = {digest([one])}
    for name in NAMES:
        changed = getattr(one, name).clone()
        changed[1, 3] += 1
        others |= {
            digest([replace(one, **{name: changed})]),
            digest([replace(one, **{name: changed.view(4, 2)})]),
        }
    assert len(others) == 11


def test_a_stop_comes_in_its_step_and_a_resume_appends(tmp_path: Path) -> None:
    state, stop = State(), Stop()
    with handlers(stop.request):
        for data in Trace(stop_at=3).steps_of(Source(), state, tmp_path, rank=1).steps(0, 0, 9):
            assert stop() == (state.step == 2)
            state.advance(data, StepCounts.of(data.batches, 9))
            if stop():
                break
    assert stop.signal == signal.SIGTERM and state.step == 3
    for _ in Trace().steps_of(Source(), state, tmp_path, rank=1).steps(0, 3, 6):
        pass
    assert read(tmp_path) == {1: [(step, digest([batch(step - 1)])) for step in range(1, 10)]}
