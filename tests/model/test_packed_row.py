"""What attention is given of the samples of a row. flash-attn has no build for a CPU: its functions are
stand-ins behind transformers' own code, which is the real one."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor

from mft.model.causal_lm import CausalLM
from mft.model.packed_row import PackedRow
from mft.model.token_loss import TokenLoss
from tests.model.rows import batch, inputs
from tests.model.test_attention import model_of
from tests.model.varlen import varlen_2_13

CPU = torch.device("cpu")


def test_a_row() -> None:
    row = PackedRow.of([3, 1, 2], CPU)
    assert row.cu_seqlens.tolist() == [0, 3, 4, 6] and row.cu_seqlens.dtype == torch.int32
    assert row.longest == 3
    assert row.chunked(2).lengths == [2, 1, 1, 2] and row.chunked(2) is row.chunked(2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for flash-attn and returns what its varlen function is given."""
    found: list[dict[str, Any]] = []

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        assert causal and not dropout_p and not softcap
        found.append({"borders": cu_seqlens_q, "longest": max_seqlen_q, "window": window_size})
        left = window_size[0]
        shape = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return varlen_2_13(q, k, v, *shape, scale=softmax_scale, window_size=(left, 0), enable_gqa=True)

    def unused(*_: Any, **__: Any) -> None:
        raise AssertionError("a packed row goes through the varlen function")

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func = package.flash_attn_with_kvcache = unused  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    padding.pad_input = padding.unpad_input = unused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn"):
        monkeypatch.setattr(flash, name, getattr(flash, name))  # set back after the test
    flash._loaded_implementation = None
    return found


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_flash_attention_is_given_the_samples(
    name: str, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no layer looks for them in the positions; losses are those of attention sample by sample."""
    model = model_of(name)
    data = batch([[9, 1, 14], [5, 20, 3]], 32, 320)
    by_sample = TokenLoss(model, CausalLM("unused"))
    assert by_sample.per_sample
    expected = by_sample(*inputs(data))[0]
    model.config._attn_implementation_internal = "flash_attention_2"  # loading refuses it without a GPU
    module = TokenLoss(model, CausalLM("unused"))
    assert not module.per_sample and module.one_row

    def look(*_: Any) -> None:
        raise AssertionError("a layer looks for samples in the positions")

    monkeypatch.setattr(flash, "_is_packed_sequence", look)
    nll_BT = module(*inputs(data))[0]
    assert torch.allclose(nll_BT, expected, atol=2e-6)
    assert len(calls) == model.config.num_hidden_layers
    assert {call["borders"].data_ptr() for call in calls} == {calls[0]["borders"].data_ptr()}
    borders = calls[0]["borders"]
    assert borders.dtype == torch.int32 and borders.tolist() == [0, 9, 10, 24, 29, 49, 52]
    assert all(type(call["longest"]) is int and call["longest"] == 20 for call in calls)
