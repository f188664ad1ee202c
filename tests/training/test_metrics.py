"""What a logged row says: sums over the steps since the row before, over all ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mft.batch import IGNORE, Batch, StepCounts
from mft.training.metrics import Meter

ALONE: Any = SimpleNamespace(
    sum=lambda tensor: tensor, gather=lambda value: [value], world=1, rank=0, is_main=True
)


def batch(tasks: list[list[int]]) -> Batch:
    """Rows of one sample each; -1 is padding. Every token is trained."""
    task_BT = torch.tensor(tasks)
    here = task_BT >= 0
    row = torch.arange(len(tasks))[:, None].expand_as(task_BT)
    target_BT = torch.where(here, 1, IGNORE)
    return Batch(task_BT.clamp(0), target_BT, task_BT, torch.where(here, row, -1), torch.zeros_like(task_BT))


def stepped(meter: Meter, micro_batches: list[Batch], nll: float, grad_norm: float = 1.0) -> None:
    meter.begin_step()
    for one in micro_batches:
        nll_BT = torch.where(one.target_BT != IGNORE, nll, 0.0)
        meter.add(one, nll_BT, torch.tensor(nll / len(micro_batches)), torch.tensor(0.0))
    meter.commit(StepCounts.of(micro_batches, 2), grad_norm, micro_batches)


def test_a_row_is_of_the_steps_since_the_row_before() -> None:
    meter = Meter(["a", "b"], "cpu")
    one, other = batch([[0, 0, 0, -1]]), batch([[1, 1, -1, -1]])
    stepped(meter, [one, other], nll=2.0)
    stepped(meter, [one], nll=4.0, grad_norm=3.0)
    row = meter.read(ALONE)
    assert row["train/loss"] == pytest.approx(3.0) and row["grad_norm"] == 3.0
    assert row["train/loss/a"] == pytest.approx(3.0) and row["train/loss/b"] == pytest.approx(2.0)
    assert (row["train/tokens/a"], row["train/tokens/b"]) == (6, 2)
    assert (row["train/samples/a"], row["train/samples/b"]) == (2, 1)
    assert row["data/fill"] == pytest.approx(8 / 12)
    assert meter.read(ALONE) == {}


def test_a_task_without_a_token_has_no_loss_and_a_skipped_step_no_share_in_it() -> None:
    meter = Meter(["a", "b"], "cpu")
    stepped(meter, [batch([[0, 0]])], nll=2.0)
    meter.begin_step()
    bad = batch([[1, 1]])
    meter.add(bad, torch.full((1, 2), math.inf), torch.tensor(math.inf), torch.tensor(0.0))
    meter.skip([bad])
    row = meter.read(ALONE)
    assert "train/loss/b" not in row and row["train/tokens/b"] == 0
    assert row["train/loss"] == 2.0 and row["train/skipped_steps"] == 1


def test_sums_are_taken_up_where_a_run_was_interrupted() -> None:
    whole, first, second = (Meter(["a", "b"], "cpu") for _ in range(3))
    one, other = batch([[0, 0, 0, -1]]), batch([[1, 0, -1, -1]])
    for meter in (whole, first):
        stepped(meter, [one], nll=2.0)
    second.resume(first.state(ALONE), ALONE)
    for meter in (whole, second):
        stepped(meter, [other], nll=5.0)
    rows = [meter.read(ALONE) for meter in (whole, second)]
    timed = ("speed/", "memory/")
    assert len(rows[0]) > 8
    assert {k: v for k, v in rows[0].items() if not k.startswith(timed)} == {
        k: v for k, v in rows[1].items() if not k.startswith(timed)
    }


def test_the_hardware_does_more_than_the_model_where_activations_are_made_again() -> None:
    rows = []
    for recomputed in (0.0, 2e9):
        meter = Meter(["a", "b"], "cpu", 6e9, peak_tflops=1.0, recomputed_per_token=recomputed)
        stepped(meter, [batch([[0, 0]])], nll=2.0)
        rows.append(meter.read(ALONE))
    kept, again = rows
    assert kept["speed/mfu"] == pytest.approx(kept["speed/tokens_per_second"] * 6e9 / 1e12)
    assert "speed/hfu" not in kept
    assert again["speed/hfu"] / again["speed/mfu"] == pytest.approx(8 / 6)
