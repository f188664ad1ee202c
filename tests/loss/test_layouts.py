"""Every mode of conf/loss gives the same loss, gradient and weights however the global batch is split and
arranged."""

import dataclasses
import functools
import io

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mft.loss.base import TaskLoss, task_sums
from tests.loss.layout import packed, padded, pieces, step, token_losses
from tests.loss.modes import ALIASES, MODES, config, made

LAYOUTS = {
    "1x4": [[[0, 1], [2, 3], [4, 5], [6, 7]]],
    "2x2": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
    "4x1": [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]],
    "uneven": [[[6], [1, 5, 7]], [[0, 2, 3], [4]]],
}
WHOLE = [[list(range(8))]]
TASKS = [0, 1, 1, 0, 2, 1, 0, 2]
LENGTHS = [7, 2, 5, 1, 3, 9, 4, 6]


def started(name: str) -> TaskLoss:
    loss = made(name, **({"window": 2} if "window" in config(name) else {}))
    loss.setup(["a", "b", "c"], [1.0, 1.0, 1.0])
    return loss


def run(loss: TaskLoss, partition, arrange, steps=range(1, 9), dtype=torch.float64):
    """Returns (value, gradient, weights) of each step, played in the order in which the training loop calls a
    mode."""
    masks = [[j % 4 != 1 or length == 1 for j in range(length)] for length in LENGTHS]
    samples = pieces(TASKS, masks)
    ranks = [[arrange([samples[i] for i in micro]) for micro in micros] for micros in partition]
    seen = []
    for number in steps:
        random = np.random.default_rng(number)
        nll_all = torch.tensor(random.gamma(2.0, 1.0, sum(LENGTHS)), dtype=dtype, requires_grad=True)
        if loss.wants_probe(number):
            loss.learn(
                number, valid_K=torch.tensor(random.gamma(2.0, 1.0, 3) * [0.9**number, 1.0, 1.02**number])
            )
        value = step(loss, nll_all, ranks)
        (grad,) = torch.autograd.grad(value, nll_all)
        if loss.wants_train(number):
            loss.learn(number, train_K=means(nll_all, ranks))
        if loss.wants_repeat(number):
            loss.learn(number, repeat_K=means(nll_all * 0.95 + 0.01, ranks))
        seen.append((value.detach(), grad, loss.weight_K.clone()))
    return seen


@functools.cache
def whole(mode: str):
    """The steps of the global batch in one padded micro-batch."""
    return run(started(mode), WHOLE, padded)


def means(nll_all, ranks):
    sums = [
        task_sums(token_losses(nll_all, batch, where_BT), batch, 3)
        for micro in ranks
        for batch, where_BT in micro
    ]
    sum_K, count_K = torch.stack(sums).sum(0)
    return sum_K / count_K


@pytest.mark.parametrize("arrange", [padded, packed])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_partitioned_is_whole(mode, layout, arrange):
    parts = run(started(mode), LAYOUTS[layout], arrange)
    for whole_step, part_step in zip(whole(mode), parts, strict=True):
        for left, right in zip(whole_step, part_step, strict=True):
            torch.testing.assert_close(right, left, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_float32_losses_give_float32_shares(mode):
    for (value, grad, _), (exact, exact_grad, _) in zip(
        run(started(mode), LAYOUTS["2x2"], packed, dtype=torch.float32), whole(mode), strict=True
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_resumed_is_uninterrupted_to_the_bit(mode):
    straight = run(started(mode), LAYOUTS["2x2"], padded)
    first, second, file = started(mode), started(mode), io.BytesIO()
    run(first, LAYOUTS["2x2"], padded, range(1, 6))
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for left, right in zip(straight[5:], run(second, LAYOUTS["2x2"], padded, range(6, 9)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", [mode for mode in MODES if "mean" not in mode])
def test_the_short_windows_above_do_move_the_weights(mode):
    loss = started(mode)
    if loss.wants_train(1) or loss.wants_probe(1):
        weights = [weight_K for _, _, weight_K in run(loss, WHOLE, padded)]
        assert not torch.allclose(weights[0], weights[-1], atol=1e-4)
        assert weights[-1].sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_yaml_lists_every_field_with_its_default(mode):
    node = config(mode)
    cls = type(instantiate(node, _convert_="all"))
    fields = {field.name for field in dataclasses.fields(cls)}
    assert set(node) - {"_target_"} == fields
    if mode != "famo_valid":
        schema = OmegaConf.structured(cls)
        assert OmegaConf.merge(schema, {key: node[key] for key in fields}) == schema


@pytest.mark.parametrize(("alias", "mode"), ALIASES.items())
def test_aliases_are_the_mode_itself(alias, mode):
    assert config(alias) == config(mode)
