"""What a logged row says: sums over the steps since the row before, over all ranks."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mft.batch import IGNORE, Batch, StepCounts
from mft.training.metrics import Meter
from mft.training.speed import Peak

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
    meter.commit(StepCounts.of(micro_batches, 2), grad_norm)


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
    meter.skip(StepCounts.of([bad], 2))
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


def test_the_time_of_a_resumed_row_is_that_of_all_its_steps() -> None:
    first, second = (Meter(["a", "b"], "cpu") for _ in range(2))
    stepped(first, [batch([[0, 0, 0, -1]])], nll=2.0)
    saved = first.state(ALONE)
    saved[0] |= {"seconds": 1000.0, "waited": 250.0}
    second.resume(saved, ALONE)
    stepped(second, [batch([[1, 0, -1, -1]])], nll=5.0)
    row = second.read(ALONE)
    assert row["speed/seconds_per_step"] == pytest.approx(500, rel=0.01)
    assert row["speed/tokens_per_second"] == pytest.approx(5 / 1000, rel=0.01)
    assert row["speed/data_wait_share"] == pytest.approx(0.25, rel=0.01)


def test_tokens_are_counted_with_padding_without_it_and_with_loss() -> None:
    meter = Meter(["a", "b"], "cpu")
    one = batch([[0, 0, 0, -1]])
    one = dataclasses.replace(one, target_BT=torch.tensor([[1, IGNORE, IGNORE, IGNORE]]))
    stepped(meter, [one], nll=2.0)
    row = meter.read(ALONE)
    useful = row["speed/tokens_per_second"]
    assert row["speed/all_tokens_per_second"] / useful == pytest.approx(4 / 3)
    assert row["speed/trained_tokens_per_second"] / useful == pytest.approx(1 / 3)


def test_waiting_and_memory_are_those_of_the_rank_with_most() -> None:
    """No other ranks are here: what the sum over them would be is given."""
    meter = Meter(["a", "b"], "cpu")
    stepped(meter, [batch([[0, 0]])], nll=2.0)

    def summed(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor[-6:-2].tolist() == [0.0, 0.0, 0.0, tensor[-3]] and tensor[-2:].tolist() == [0.0, 0.0]
        tensor[-2:] = torch.tensor([7.0, 2.0**50])
        return tensor

    ranks: Any = SimpleNamespace(sum=summed, world=3, rank=1, is_main=False)
    row = meter.read(ranks)
    assert row["speed/data_wait_share"] * row["speed/seconds_per_step"] == pytest.approx(7)
    assert row["memory/peak_gib"] == 2.0**20


def test_the_hardware_does_more_than_the_model_where_activations_are_made_again() -> None:
    rows = []
    for recomputed in (0.0, 2e9):
        meter = Meter(["a", "b"], "cpu", 6e9, peak_tflops=1.0, recomputed_per_token=recomputed)
        stepped(meter, [batch([[0, 0]])], nll=2.0)
        rows.append(meter.read(ALONE))
    kept, again = rows
    assert kept["speed/mfu"] == kept["speed/hfu"]
    assert kept["speed/mfu"] == pytest.approx(kept["speed/tokens_per_second"] * 6e9 / 1e12)
    assert again["speed/hfu"] / again["speed/mfu"] == pytest.approx(8 / 6)


def test_a_peak_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Peak.of("cuda", 12.5) == Peak(12.5, "train.peak_tflops")
    assert "set train.peak_tflops" in Peak.of("cpu").source and not Peak.of("cpu").tflops
    known = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA L40": 181, "NVIDIA A10G": 70}
    for name, tflops in known.items():  # no such GPU is here
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert Peak.of("cuda").tflops == tflops and "data sheet" in Peak.of("cuda").source
    for name in ("NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert not Peak.of("cuda").tflops and name in Peak.of("cuda").source
