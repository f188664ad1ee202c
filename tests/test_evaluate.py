"""Validation losses are token-weighted over all ranks, also where a task is absent from a batch or a rank."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mft.batch import IGNORE, Batch
from mft.dist.base import Ddp, Engine, Single
from mft.errors import UserError
from mft.evaluate import Evaluator
from mft.loss.coba import Coba
from mft.metrics import criterion, task_means
from tests.dist.ranks import run_ranks

FIXTURES = Path(__file__).parent / "fixtures" / "losses"


class Recorded(torch.nn.Module):
    """Stands for a model: hands out the token losses of recorded logits; ids_BT holds the number of the batch."""

    def __init__(self, nll_NBT: torch.Tensor):
        super().__init__()
        self.nll_NBT = nll_NBT

    def forward(self, ids_BT, target_BT, position_BT, sample_BT):
        return self.nll_NBT[int(ids_BT[0, 0])], torch.zeros(())


def recorded(name: str, rank: int) -> tuple[dict, Recorded, list[Batch]]:
    record, arrays = json.loads((FIXTURES / f"{name}.json").read_text()), np.load(FIXTURES / f"{name}.npz")
    logits, labels = torch.tensor(arrays["logits"][rank]).double(), torch.tensor(arrays["labels"][rank]).long()
    trained = torch.tensor(arrays["loss_mask"][rank]) > 0
    nll = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * trained
    batches = []
    for number, task_B in enumerate(torch.tensor(arrays["task_id"][rank]).long()):
        rows, length = labels[number].shape
        target_BT = torch.where(trained[number], labels[number], IGNORE)
        across = torch.arange(length).expand(rows, length)
        down = torch.arange(rows)[:, None].expand(rows, length)
        ids_BT = torch.full((rows, length), number)
        batches.append(Batch(ids_BT, target_BT, task_B.reshape(rows, 1).expand(rows, length), down, across))
    return record, Recorded(nll), batches


def evaluated(name: str, engine: Engine) -> list[list[float]]:
    record, module, batches = recorded(name, engine.rank)
    names = [f"t{k}" for k in range(record["K"])]
    return [
        Evaluator(engine, names, lambda: [batches[i] for i in used]).losses(module).tolist()  # noqa: B023
        for used in record["batches_used_per_step"]
    ]


def in_ranks(name: str) -> list[list[float]]:
    engine = Ddp().start("fp32", cpu=True)
    try:
        return evaluated(name, engine)
    finally:
        engine.close()


def check(name: str, found: list[list[float]]) -> None:
    record = json.loads((FIXTURES / f"{name}.json").read_text())
    first = record["valid_task_loss_begining"]
    for row, mean, ratio in zip(
        found, record["token_weighted_global_mean"], record["token_weighted_global_ratio"], strict=True
    ):
        for value, expected, relative, start in zip(row, mean, ratio, first, strict=True):
            if expected is None:
                assert math.isnan(value)
            else:
                assert value == pytest.approx(expected, rel=1e-6)
                assert value / start == pytest.approx(relative, rel=1e-6)


def test_one_rank_has_the_token_weighted_means() -> None:
    engine = Single().start("fp32", cpu=True)
    found = evaluated("evaluate_1rank_k3", engine)
    engine.close()
    check("evaluate_1rank_k3", found)


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_have_the_token_weighted_means() -> None:
    for found in run_ranks(2, in_ranks, "evaluate_2rank_k3"):
        check("evaluate_2rank_k3", found)


def test_coba_takes_the_validation_before_training_as_the_unit_of_its_ratios() -> None:
    loss = Coba(warmup_steps=3, history_length=10, update_interval=1)
    loss.start(["a", "b"], [1, 1])
    loss.begin(torch.tensor([4.0, math.nan], dtype=torch.float64))
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
