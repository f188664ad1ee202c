"""torch's varlen attention by the signature of each release. The installed one is called as it is, without a
kernel, on the meta device; the numbers are those of a stand-in, since the kernel needs a GPU."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mft.model import torch_private as private
from mft.model.packed_row import PackedRow
from mft.model.torch_private import Varlen, has_hooks, softmax_gradient, varlen
from tests.model.varlen import RELEASES, SEEN, varlen_2_13

varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn  # since torch 2.10

GONE = f"in torch {torch.__version__}: see mft/model/torch_private.py, read in {private.READ_IN}"
LENGTHS = [3, 1, 9, 5]


def heads(
    number: int, key_heads: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """query, key and value of a row, [T, heads, width]."""
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), count, 8) for count in (number, key_heads, key_heads)]
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def by_sample(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """torch's sdpa of each sample alone."""
    parts = []
    for q, k, v in zip(*(tensor.split(LENGTHS) for tensor in (query, key, value)), strict=True):
        seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        seen = seen.triu(1 - window) if window else seen
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize(("number", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("release", RELEASES)
def test_equals_sdpa_of_each_sample(
    release: str, number: int, key_heads: int, window: int | None, scale: float | None
) -> None:
    attend = Varlen(RELEASES[release])
    if window == 4 and not attend.windows:
        pytest.skip("2.10 has no windows; sdpa computes them")
    row = PackedRow.of(LENGTHS, torch.device("cpu"))
    inputs = heads(number, key_heads)
    ours = attend(*inputs, row.cu_seqlens, row.longest, window, scale)
    theirs = by_sample(*inputs, window, scale or 8**-0.5)
    assert torch.allclose(ours, theirs, atol=1e-6)
    wanted = torch.randn_like(ours)
    for mine, other in zip(*(torch.autograd.grad(o, inputs, wanted) for o in (ours, theirs)), strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("release", RELEASES)
def test_samples_of_one_token_are_their_values(release: str) -> None:
    row = PackedRow.of([1, 1, 1], torch.device("cpu"))
    query, key, value = (tensor[:3] for tensor in heads(4, 2))
    ours = Varlen(RELEASES[release])(query, key, value, row.cu_seqlens, row.longest)
    assert torch.allclose(ours, value.repeat_interleave(2, dim=1))


def test_without_a_window_the_kernel_wants_one_query_of_each_sample() -> None:
    query, key, value = (tensor[:3] for tensor in heads(4, 2))
    empty = torch.tensor([0, 1, 1, 2, 3], dtype=torch.int32)
    with pytest.raises(AssertionError, match="without a query"):
        varlen_2_13(query, key, value, empty, empty, 1, 1, enable_gqa=True)
    Varlen(varlen_2_13)(query, key, value, empty, 1)  # causal attention is a window there


def test_a_window_sees_the_query_and_the_keys_before_it() -> None:
    SEEN.clear()
    row = PackedRow.of(LENGTHS, torch.device("cpu"))
    for window in (None, 4, 9):
        Varlen(varlen_2_13)(*heads(2, 2), row.cu_seqlens, row.longest, window)
    assert [call["window_size"] for call in SEEN] == [(-1, 0), (3, 0), (-1, 0)]


def test_the_installed_signature_is_the_recorded_one() -> None:
    """torch 2.12 and 2.13 have this one; another that it grows into has to be looked at."""
    installed = inspect.signature(varlen_attn).parameters
    recorded = inspect.signature(varlen_2_13).parameters
    assert list(installed) == list(recorded), f"varlen_attn has another signature {GONE}"
    assert [p.kind for p in installed.values()] == [p.kind for p in recorded.values()]
    assert [p.default for p in installed.values()] == [p.default for p in recorded.values()]


def test_the_installed_function_takes_what_it_is_given() -> None:
    """Forward and backward on the meta device, which has shapes and no numbers."""
    attend = varlen()
    assert attend is not None and attend.function is varlen_attn
    assert attend.windows and attend.scales and attend.shares_keys
    row = PackedRow.of(LENGTHS, torch.device("meta"))
    inputs = heads(4, 2, "meta", torch.bfloat16)
    for window in (None, 4):
        output = attend(*inputs, row.cu_seqlens, row.longest, window, 0.7)
        assert output.shape == inputs[0].shape
        found = torch.autograd.grad(output.sum(), inputs)
        assert [g.shape for g in found] == [t.shape for t in inputs]


def test_gradient_of_a_softmax() -> None:
    scores = torch.randn(3, 5, requires_grad=True)
    weights, gradient = scores.softmax(-1), torch.randn(3, 5)
    expected = torch.autograd.grad(weights, scores, gradient)[0]
    assert torch.allclose(softmax_gradient(gradient, weights.detach()), expected, atol=1e-6), GONE


def test_what_happens_when_a_module_is_called() -> None:
    def linear() -> torch.nn.Linear:
        return torch.nn.Linear(2, 2)

    assert not has_hooks(linear()), GONE
    for method in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        hooked = linear()
        handle = getattr(hooked, method)(lambda *_: None)
        assert has_hooks(hooked), f"{method} {GONE}"
        handle.remove()
        assert not has_hooks(hooked)
    replaced = linear()
    replaced.forward = replaced.forward  # type: ignore[method-assign]
    assert has_hooks(replaced)
