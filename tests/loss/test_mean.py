import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mft.batch import Counts
from mft.errors import UserError
from mft.loss.base import task_sums
from mft.loss.mean import SampleMean, TaskSampleMean, TaskTokenMean, TokenMean
from tests.loss.layout import packed, padded, pieces, step, token_losses

FIXTURES = Path(__file__).parent.parent / "fixtures" / "losses"
MODES = {"case1": TokenMean, "case2": SampleMean, "case3": TaskTokenMean, "case4": TaskSampleMean}


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
    ],
)
def test_two_by_four_by_hand(kind, weights, expected):
    samples, nll_all = two_by_four()
    loss = kind()
    loss.start(["a", "b"], weights)
    value = step(loss, nll_all, [[padded(samples)]])
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, abs=1e-14)


def test_task_and_sample_balance_differ_where_a_task_has_several_samples():
    samples = pieces([0, 0, 1], [[True] * 3, [True], [True] * 2])
    nll_all = torch.tensor([1, 2, 3, 10, 4, 6], dtype=torch.float64)
    values = {}
    for kind in MODES.values():
        loss = kind()
        loss.start(["a", "b"], [1, 1])
        values[kind] = step(loss, nll_all, [[padded(samples)]]).item()
    assert values[TokenMean] == pytest.approx(26 / 6)
    assert values[SampleMean] == pytest.approx((2 + 10 + 5) / 3)
    assert values[TaskTokenMean] == pytest.approx((16 / 4 + 5) / 2)
    assert values[TaskSampleMean] == pytest.approx((6 + 5) / 2)


def fixture(path: Path, dtype: torch.dtype):
    """Returns the record, its arrays, logits with a graph, the nll of every position, and the samples."""
    record, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    logits_BTV = torch.tensor(arrays["logits"], dtype=dtype).requires_grad_()
    labels_BT = torch.tensor(arrays["labels"], dtype=torch.int64)
    trained_BT = labels_BT != -100
    if "loss_mask" in arrays:
        trained_BT &= torch.tensor(arrays["loss_mask"]) > 0
    nll_BT = -logits_BTV.log_softmax(-1).gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    samples = pieces(arrays["task_id"][:, 0].tolist(), trained_BT.tolist())
    return record, arrays, logits_BTV, nll_BT.flatten(), samples


@pytest.mark.filterwarnings("ignore:.*has no task weights")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", MODES)
@pytest.mark.parametrize("path", sorted(FIXTURES.glob("static_*.json")), ids=lambda path: path.stem)
def test_original_losses_and_gradients(path, case, dtype):
    record, arrays, logits_BTV, nll_all, samples = fixture(path, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    key = "original_head_on_batch_without_zero_token_rows" if "zero_token_rows" in record else "original_head"
    prefix = "grad_dropped_" if "zero_token_rows" in record else "grad_"
    rows = [[row for micro in micros for row in micro] for micros in record.get("partition", [])]
    layouts = {"1x1": [[list(range(len(samples)))]], "4 micro-batches": [[[i] for i in range(len(samples))]]}
    if rows:
        layouts |= {"ranks x accumulation": record["partition"]}
    loss = MODES[case]()
    loss.start([f"t{i}" for i in range(record["K"])], record["task_weights"] or [1.0] * record["K"])
    for name, partition in layouts.items():
        for arrange in (padded, packed):
            ranks = [[arrange([samples[i] for i in micro]) for micro in micros] for micros in partition]
            value = step(loss, nll_all, ranks)
            (grad_BTV,) = torch.autograd.grad(value, logits_BTV, retain_graph=True)
            assert value.item() == pytest.approx(record[key][case]["loss"], rel=tolerance), (name, arrange)
            error = np.abs(grad_BTV.numpy() - arrays[f"{prefix}{case}"]).max() / np.abs(arrays[f"{prefix}{case}"]).max()
            assert error < tolerance, (name, arrange)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("static_*.json")), ids=lambda path: path.stem)
def test_task_sums_are_the_originals_task_losses(path):
    record, _, _, nll_all, samples = fixture(path, torch.float64)
    batch, where_BT = packed(samples)
    sum_K, count_K = task_sums(token_losses(nll_all, batch, where_BT), batch, record["K"])
    assert sum_K.dtype == torch.float64
    for total, count, original in zip(
        sum_K.tolist(), count_K.tolist(), record["original_head"]["case1"]["task_loss"], strict=True
    ):
        if count:
            assert total / count == pytest.approx(original, rel=1e-6)  # float32 in the original
        else:
            assert original in (0.0, "nan")


def test_every_present_task_of_weight_zero_is_an_error_that_names_them():
    samples, nll_all = two_by_four()
    loss = TaskTokenMean()
    loss.start(["a", "b", "absent"], [0, 0, 1])
    with pytest.raises(UserError, match=r"task\.a\.weight, task\.b\.weight\)"):
        step(loss, nll_all, [[padded(samples)]])


def test_negative_weight_is_refused():
    with pytest.raises(UserError, match=r"task\.b\.weight is -1"):
        TaskTokenMean().start(["a", "b"], [1, -1])


def test_weights_that_do_nothing_are_told():
    with pytest.warns(UserWarning, match=r"TokenMean has no task weights.*task\.b\.weight=2"):
        TokenMean().start(["a", "b"], [1, 2])


@pytest.mark.parametrize("kind", MODES.values())
def test_a_batch_without_trained_tokens_has_a_share_of_zero_with_a_graph(kind):
    loss = kind()
    loss.start(["a", "b"], [1, 1])
    batch, _ = padded(pieces([0], [[False, False]]))
    nll_BT = torch.zeros(batch.ids_BT.shape, requires_grad=True)
    for others in (False, True):
        counts = Counts.of([batch, padded(pieces([1], [[True]]))[0]] if others else [batch], 2)
        share = loss.share(nll_BT, batch, counts)
        share.backward()
        assert share.item() == 0 and math.isfinite(nll_BT.grad.sum())
