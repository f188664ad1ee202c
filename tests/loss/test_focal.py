import pytest
import torch

from mft.errors import UserError
from mft.loss.focal import SampleFocal, TaskFocal
from mft.loss.means import SampleMean, TaskSampleMean
from tests.loss.layout import padded, pieces, step


def example():
    """Task 0: samples of token losses (1, 3) and (2); task 1: one sample of losses (0.5, 0.1)."""
    samples = pieces([0, 0, 1], [[True, True], [False, True], [True, True]])
    return samples, torch.tensor([1, 3, 0, 2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)


def dense(nll_all):
    """Returns P and Q of the three samples of `example`."""
    p = (-nll_all).exp()
    P = torch.stack([(p[0] + p[1]) / 2, p[3], (p[4] + p[5]) / 2])
    Q = -torch.stack([(nll_all[0] + nll_all[1]) / 2, nll_all[3], (nll_all[4] + nll_all[5]) / 2])
    return P, Q


def started(loss, weights=(1.0, 1.0)):
    loss.setup(["a", "b"], weights)
    return loss


def both(value, nll_all):
    return value.item(), torch.autograd.grad(value, nll_all)[0]


def test_sample_focal_equals_the_equation_with_its_gradient():
    samples, nll_all = example()
    loss = started(SampleFocal(gamma=2.0, alpha=1.5, gamma_by_task={"b": 0.5}, alpha_by_task={"a": 0.7}))
    P, Q = dense(nll_all)
    gamma, alpha = torch.tensor([2, 2, 0.5]), torch.tensor([0.7, 0.7, 1.5], dtype=torch.float64)
    expected, expected_grad = both(-(alpha * (1 - P) ** gamma * Q).sum() / 3, nll_all)
    value, grad = both(step(loss, nll_all, [[padded(samples)]]), nll_all)
    assert value == pytest.approx(expected, abs=1e-14)
    torch.testing.assert_close(grad, expected_grad, atol=1e-14, rtol=0)


@pytest.mark.parametrize("split", [[[[0, 1, 2]]], [[[0], [1], [2]]], [[[0, 2]], [[1]]]])
def test_task_focal_equals_the_equation_with_its_gradient_however_split(split):
    samples, nll_all = example()
    loss = started(
        TaskFocal(gamma=1.5, alpha=1.0, gamma_by_task={"b": 3.0}, alpha_by_task={"b": 0.25}), (1.0, 2.0)
    )
    P, Q = dense(nll_all)
    P, Q = torch.stack([P[:2].mean(), P[2]]), torch.stack([Q[:2].mean(), Q[2]])
    scale = torch.tensor([1 / 3, 2 / 3 * 0.25], dtype=torch.float64)
    expected, expected_grad = both(-(scale * (1 - P) ** torch.tensor([1.5, 3.0]) * Q).sum(), nll_all)
    ranks = [[padded([samples[i] for i in micro]) for micro in micros] for micros in split]
    value, grad = both(step(loss, nll_all, ranks), nll_all)
    assert value == pytest.approx(expected, abs=1e-14)
    torch.testing.assert_close(grad, expected_grad, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("focal", "mean"), [(SampleFocal, SampleMean), (TaskFocal, TaskSampleMean)])
def test_without_focus_it_is_the_plain_mean(focal, mean):
    samples, nll_all = example()
    value, grad = both(step(started(focal(gamma=0.0)), nll_all, [[padded(samples)]]), nll_all)
    expected, expected_grad = both(step(started(mean()), nll_all, [[padded(samples)]]), nll_all)
    assert value == pytest.approx(expected, abs=1e-15)
    torch.testing.assert_close(grad, expected_grad, atol=1e-15, rtol=0)


@pytest.mark.parametrize("focal", [SampleFocal, TaskFocal])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_sample_predicted_with_certainty_gives_finite_gradients(focal, gamma):
    samples = pieces([0, 1], [[True, True], [True, False]])
    nll_all = torch.zeros(4, requires_grad=True)
    value, grad = both(step(started(focal(gamma=gamma)), nll_all, [[padded(samples)]]), nll_all)
    assert value == 0 and bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("focal", [SampleFocal, TaskFocal])
def test_a_negative_factor_is_refused(focal):
    with pytest.raises(UserError, match=r"loss\.alpha=-1\.0 must be at least 0"):
        focal(alpha=-1.0)
