"""torch.nn.attention.varlen.varlen_attn in Python, since its kernel needs a GPU: one function for each signature
that it has had, refusing what the kernel refuses, and written over a mask of the whole row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SEEN: list[dict[str, Any]] = []
"""What each call was given."""


def varlen_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> Tensor:
    assert query.shape[1] == key.shape[1], "nothing says that it takes fewer key heads"
    # flash-attn takes back is_causal, not a window, where no sample has more than one query
    right = 0 if is_causal and max_q > 1 else -1
    return _attention(locals(), (-1, right), query.shape[-1] ** -0.5)


def varlen_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert query.shape[1] == key.shape[1], "nothing says that it takes fewer key heads"
    return _attention(locals(), window_size, scale)


def varlen_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _attention(locals(), window_size, scale)


RELEASES = {"2.10": varlen_2_10, "2.11": varlen_2_11, "2.13": varlen_2_13}


def _attention(call: dict[str, Any], window_size: tuple[int, int], scale: float | None) -> Tensor:
    SEEN.append(call)
    query, key, value, borders = call["query"], call["key"], call["value"], call["cu_seq_q"]
    assert query.dtype == key.dtype == value.dtype
    assert all(tensor.dim() == 3 and tensor.stride(-1) == 1 for tensor in (query, key, value))
    assert borders.dtype == torch.int32 and borders.device == query.device and call["cu_seq_k"] is borders
    assert type(call["max_q"]) is type(call["max_k"]) is int
    assert call["max_q"] == call["max_k"] == int(borders.diff().max())
    assert int(borders[0]) == 0 and int(borders[-1]) == len(query)
    if call["max_q"] == 1 and query.shape[1] > key.shape[1] and max(window_size) < 0:
        # flash-attn then makes a batch of decoding steps of the queries, one for each sample
        assert len(query) == len(borders) - 1, "a sample without a query"
    sample_t = torch.repeat_interleave(torch.arange(len(borders) - 1), borders.diff())
    place_t = torch.arange(len(query))
    ahead = place_t[None, :] - place_t[:, None]  # of the query
    left, right = (float("inf") if size < 0 else size for size in window_size)
    seen = (sample_t[:, None] == sample_t[None, :]) & (ahead >= -left) & (ahead <= right)
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)
