"""Adaptive modes against the original's numbers, and what they do where the original went wrong."""

import io
import json
import math

import numpy as np
import pytest
import torch

from mft.errors import UserError
from mft.loss.adaptive import Adaptive
from mft.loss.coba import Coba
from mft.loss.dwa import Dwa
from mft.loss.famo import Famo
from mft.loss.lbtw import Lbtw
from mft.loss.self_paced import SelfPaced
from mft.loss.task_history import line_slope
from mft.loss.uncertainty import Uncertainty
from tests.loss.fixtures import FIXTURES, losses, original_probe, started
from tests.loss.modes import MODES, made


def fixtures(pattern: str):
    return pytest.mark.parametrize("path", sorted(FIXTURES.glob(pattern)), ids=lambda path: path.stem)


def paper_coba(table, warmup, length, tau):
    """CoBa's equations written down anew, for complete probes at interval 1: the weights after the last
    row."""
    slopes = []
    for t in range(warmup - 1, len(table)):
        window = np.arange(max(1, t - length + 1), t + 1)
        slopes.append([np.polyfit(window, table[window, i], 1)[0] for i in range(table.shape[1])])
    slopes = np.array(slopes)[-length:]

    def softmax(values):
        return np.exp(values) / np.exp(values).sum()

    tasks, n, last = table.shape[1], len(slopes), slopes[-1]
    highest = slopes.max(axis=1)
    rcs = softmax(tasks * last / np.abs(last).sum())
    acs = softmax(-n * last / np.abs(slopes).sum(axis=0))
    df = min(n * softmax(-tau * n * highest / np.abs(highest).sum())[-1], 1)
    return df * rcs + (1 - df) * acs


@fixtures("coba_k*mixed.json")
@pytest.mark.parametrize("length", [12, 100])
def test_coba_paper_is_its_equations(path, length):
    table = np.array(json.loads(path.read_text())["val_loss_ratio"])
    loss = started(Coba(warmup_steps=12, history_length=length, tau=2.0, update_interval=1), table.shape[1])
    loss.learn(1, valid_K=torch.ones(table.shape[1]))
    for update in range(1, len(table)):
        loss.learn(update + 1, valid_K=losses(table[update]))
        if update >= 11:
            expected = paper_coba(table[: update + 1], 12, length, 2.0)
            assert loss.weight_K.numpy() == pytest.approx(expected, abs=1e-8)


@fixtures("coba_*.json")
def test_coba_paper_caps_df_and_stays_finite(path):
    record = json.loads(path.read_text())
    loss = started(Coba(warmup_steps=10, history_length=30, update_interval=1), record["K"])
    for update, row in enumerate(record["val_loss_ratio"]):
        logged = loss.learn(update + 1, valid_K=original_probe(row))
        assert logged.get("coba/df", 0) <= 1
        assert loss.weight_K.sum().item() == pytest.approx(1) and (loss.weight_K > 0).all()


@pytest.mark.parametrize("kind", [Coba, SelfPaced])
def test_absent_infinite_and_flat_tasks_do_no_harm(kind):
    loss = started(kind(warmup_steps=3, history_length=5, update_interval=1), 4)
    for update in range(30):
        falling = 1 / (1 + 0.1 * update)
        infinite = math.inf if update % 7 == 3 else 2 * falling
        logged = loss.learn(update + 1, valid_K=losses([falling, infinite, None, 0.5]))
        assert torch.isfinite(loss.weight_K).all() and loss.weight_K.sum().item() == pytest.approx(1)
    assert logged[f"{loss.mode}/dropped/t1"] == 4
    assert f"{loss.mode}/slope/t2" not in logged and logged[f"{loss.mode}/slope/t3"] == 0
    if kind is Coba:
        assert loss.weight_K[2].item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("kind", [Coba, SelfPaced])
def test_all_flat_histories_give_equal_weights(kind):
    loss = started(kind(warmup_steps=3, history_length=5, update_interval=1), 3)
    for update in range(10):
        loss.learn(update + 1, valid_K=losses([0.1, 0.7, 1 / 3]))
    assert loss.weight_K.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("kind", [Coba, SelfPaced])
def test_missing_probes_keep_the_slope(kind):
    loss = started(kind(warmup_steps=3, history_length=40, update_interval=1), 2)
    for update in range(40):
        value = 2 - 0.01 * update if update % 2 == 0 or update == 39 else None
        logged = loss.learn(update + 1, valid_K=losses([value, 1 + 0.02 * update]))
    assert logged[f"{loss.mode}/slope/t0"] == pytest.approx(-0.01 / (2 if kind is Coba else 1), rel=1e-9)


@pytest.mark.parametrize("kind", [Coba, SelfPaced])
def test_static_weights_hold_until_warm_up_ends(kind):
    loss = started(kind(warmup_steps=6, history_length=10, update_interval=2), 2, [3.0, 1.0])
    for number in range(1, 7):
        assert loss.wants_probe(number) == (number in (1, 3, 5))
        if loss.wants_probe(number):
            loss.learn(number, valid_K=losses([1 - 0.1 * number, 1 + 0.2 * number]))
        assert (loss.weight_K.tolist() == [0.75, 0.25]) == (number < 5)


@pytest.mark.parametrize("length", [10, 100])
def test_slopes_are_right_at_step_100_000(length):
    loss = started(SelfPaced(warmup_steps=3, history_length=length), 2)
    for update in range(100_000 - length, 100_001):
        logged = loss.learn(update + 1, valid_K=losses([5 - 2e-5 * update, 1 + 1e-5 * update]))
    assert logged["self_paced/slope/t0"] == pytest.approx(-2e-5, rel=1e-9)
    assert logged["self_paced/slope/t1"] == pytest.approx(1e-5, rel=1e-9)


def test_line_slope_by_hand():
    assert line_slope(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 4.0])) == pytest.approx(13 / 14)
    assert math.isnan(line_slope(np.array([1.0]), np.array([1.0])))


@pytest.mark.parametrize("kind", [Coba, SelfPaced])
@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"warmup_steps": 10, "update_interval": 3},
            r"loss\.warmup_steps is 10.*set loss\.warmup_steps to 9 or 12",
        ),
        (
            {"warmup_steps": 4, "update_interval": 2},
            r"loss\.warmup_steps is 4.*at least 3 x loss\.update_interval = 6",
        ),
        (
            {"warmup_steps": 100, "history_length": 50, "update_interval": 1},
            r"loss\.history_length is 50.*update_interval = 100",
        ),
        ({"update_interval": 0}, r"loss\.update_interval=0 must be"),
        ({"probe_samples": 0}, r"loss\.probe_samples=0 must be"),
    ],
)
def test_impossible_windows_name_the_number_to_change(kind, values, told):
    with pytest.raises(UserError, match=told):
        kind(**values)


def test_famo_leaves_absent_tasks_alone_and_favours_the_slower_ones():
    loss = started(Famo(), 3)
    for number in range(1, 4):
        loss.learn(number, train_K=losses([2.0, 2.0, None]))
        loss.learn(number, repeat_K=losses([1.0, 1.9, None]))
    assert loss.xi_K[2] == 0 and loss.xi_K[1] > 0 > loss.xi_K[0]


def test_famo_on_validation_uses_successive_probes():
    loss = started(Famo(source="valid"), 2)
    assert loss.wants_probe(1) and not loss.wants_repeat(1)
    for number, row in enumerate([[2.0, 2.0], [1.0, 2.0], [0.5, 2.0]], start=1):
        loss.learn(number, valid_K=losses(row))
    assert loss.xi_K[1] > 0 > loss.xi_K[0]


def test_dwa_by_hand():
    loss = started(Dwa(window=2, temperature=2.0), 3)
    for number, row in enumerate([[4, 2, None], [2, 2, 1], [1, 2, 1], [2, 2, 1]], start=1):
        assert loss.weight_K.tolist() == pytest.approx([1 / 3] * 3)
        loss.learn(number, train_K=losses(row))
    powers = np.exp(np.array([1.5 / 3, 1.0, 1.0]) / 2)
    assert loss.weight_K.numpy() == pytest.approx(powers / powers.sum())


def test_lbtw_by_hand():
    loss = started(Lbtw(alpha=0.5, reset_every=3), 2)
    for number, (row, expected) in enumerate(
        [([4, 1], [1, 1]), ([1, 1], [0.5, 1]), ([1, None], [0.5, 1]), ([1, 1], [1, 1])], start=1
    ):
        loss.learn(number, train_K=losses(row))
        assert loss.weight_K.numpy() == pytest.approx(np.array(expected) / sum(expected))


def test_uncertainty_follows_the_gradient_of_its_objective():
    loss = started(Uncertainty(lr=0.01), 2)
    s_K = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s_K], lr=0.01)
    for number in range(1, 30):
        row = losses([3 / number, 0.2])
        adam.zero_grad()
        (0.5 * ((-s_K).exp() * row + s_K)).sum().backward()
        adam.step()
        loss.learn(number, train_K=row)
    weight_K = (-s_K).exp().detach()
    torch.testing.assert_close(loss.weight_K, weight_K / weight_K.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", [mode for mode in MODES if isinstance(made(mode), Adaptive)])
def test_memory_belongs_to_a_tasks_name_whatever_its_place(mode):
    """A checkpoint of the tasks a, b, c is loaded where they come as c, a, b; both then learn the same
    losses."""
    names, others = ["a", "b", "c"], ["c", "a", "b"]
    draw = np.random.default_rng(1)

    def teach(loss, step, table):
        loss_K = losses(table[name] for name in loss.names)
        if step == 1:
            loss.set_initial_losses(loss_K)
        loss.learn(step, valid_K=loss_K)
        loss.learn(step, train_K=loss_K)
        return loss.learn(step, repeat_K=loss_K * torch.tensor([table[name] for name in loss.names]).sqrt())

    one, other = made(mode), made(mode)
    one.setup(names, [1.0] * 3)
    other.setup(others, [1.0] * 3)
    for step in range(1, 7):
        teach(one, step, dict(zip(names, draw.uniform(0.5, 3, 3), strict=True)))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state)
    for step in range(7, 12):
        table = dict(zip(names, draw.uniform(0.5, 3, 3), strict=True))
        teach(one, step, table)
        teach(other, step, table)
        weights = dict(zip(others, other.weight_K.tolist(), strict=True))
        assert [weights[name] for name in names] == pytest.approx(one.weight_K.tolist(), rel=1e-9)
    assert len(set(one.weight_K.tolist())) == 3, "the memory was never needed"
    third = made(mode)
    third.setup(["a", "b", "d"], [1.0] * 3)
    with pytest.raises(UserError, match="remembers the tasks a, b, c, but not d"):
        third.load_state_dict(state)
