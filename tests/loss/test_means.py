import math

import pytest
import torch

from mft.batch import StepCounts
from mft.errors import UserError
from mft.loss.means import SampleMean, TaskSampleMean, TaskTokenMean, TokenMean
from tests.loss.fixtures import CASES
from tests.loss.layout import padded, pieces, step


def two_by_four():
    """Two rows of four positions: tasks 0 and 1, with 3 and 1 trained tokens of losses 1, 2, 3 and 8."""
    samples = pieces([0, 1], [[False, True, True, True], [False, False, True, False]])
    nll_all = torch.tensor([0, 1, 2, 3, 0, 0, 8, 0], dtype=torch.float64)
    return samples, nll_all


@pytest.mark.parametrize(
    ("kind", "weights", "expected"),
    [
        (TokenMean, [1, 1], (1 + 2 + 3 + 8) / 4),
        (SampleMean, [1, 1], (2 + 8) / 2),
        (TaskTokenMean, [3, 1], 0.75 * 2 + 0.25 * 8),
        (TaskSampleMean, [1, 1], (2 + 8) / 2),
        (TaskTokenMean, [0, 2], 8),
        (TaskTokenMean, [1e308, 1e308], 5),
        (TaskSampleMean, [1e308, 1.0], 2),
    ],
)
def test_two_by_four_by_hand(kind, weights, expected):
    samples, nll_all = two_by_four()
    loss = kind()
    loss.setup(["a", "b"], weights)
    value = step(loss, nll_all, [[padded(samples)]])
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, abs=1e-14)


def test_task_and_sample_balance_differ_where_a_task_has_several_samples():
    samples = pieces([0, 0, 1], [[True] * 3, [True], [True] * 2])
    nll_all = torch.tensor([1, 2, 3, 10, 4, 6], dtype=torch.float64)
    values = {}
    for kind in CASES.values():
        loss = kind()
        loss.setup(["a", "b"], [1, 1])
        values[kind] = step(loss, nll_all, [[padded(samples)]]).item()
    assert values[TokenMean] == pytest.approx(26 / 6)
    assert values[SampleMean] == pytest.approx((2 + 10 + 5) / 3)
    assert values[TaskTokenMean] == pytest.approx((16 / 4 + 5) / 2)
    assert values[TaskSampleMean] == pytest.approx((6 + 5) / 2)


@pytest.mark.parametrize("kind", [TaskTokenMean, TaskSampleMean])
def test_a_step_whose_tasks_all_have_weight_zero_has_the_loss_zero_and_no_gradient(kind):
    samples, nll_all = two_by_four()
    nll_all.requires_grad_()
    loss = kind()
    loss.setup(["a", "b", "absent"], [0, 0, 1])
    value = step(loss, nll_all, [[padded(samples)]])
    value.backward()
    assert value.item() == 0 and not nll_all.grad.any()


def test_negative_weight_is_refused():
    with pytest.raises(UserError, match=r"task\.b\.weight=-1 must be at least 0"):
        TaskTokenMean().setup(["a", "b"], [1, -1])


def test_weights_that_do_nothing_are_told():
    with pytest.warns(UserWarning, match=r"loss=token_mean has no task weights.*task\.b\.weight=2"):
        TokenMean().setup(["a", "b"], [1, 2])


@pytest.mark.parametrize("kind", CASES.values())
def test_a_batch_without_trained_tokens_has_a_share_of_zero_with_a_graph(kind):
    loss = kind()
    loss.setup(["a", "b"], [1, 1])
    batch, _ = padded(pieces([0], [[False, False]]))
    nll_BT = torch.zeros(batch.ids_BT.shape, requires_grad=True)
    for others in (False, True):
        counts = StepCounts.of([batch, padded(pieces([1], [[True]]))[0]] if others else [batch], 2)
        share = loss.share(nll_BT, batch, counts)
        share.backward()
        assert share.item() == 0 and math.isfinite(nll_BT.grad.sum())
