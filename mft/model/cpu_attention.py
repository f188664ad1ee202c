"""Causal attention of a packed row on a CPU: matrix products of a block of queries with all keys before it.

torch's sdpa multiplies small tiles, far below the speed of a large product in bf16. Half of the masked scores
are never computed here either. Scores and softmax are float32, and backward makes the weights anew, so that
nothing but query, key and value is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mft.model.torch_private import softmax_gradient

BLOCK = 64
"""Queries of one block."""

LONGEST = 2048
"""Tokens of a sample up to which this is faster; the scores of a longer one's block leave the cache."""


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None = None
) -> Tensor:
    """Returns attention within each of a row's samples, [1, T, heads, width], as transformers' interface has
    it.

    query: [1, heads, T, width]; key, value: the same, perhaps with fewer heads; lengths: tokens of the
    samples, one after the other; scale: of the scores, None = width ** -0.5.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _CausalAttention.apply(query[0], key[0], value[0], lengths, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scale = lengths, scale
        heads, length, _ = query.shape
        output = value.new_empty((1, length, heads, value.shape[-1]))
        by_key = _by_key_head(output[0].transpose(0, 1), key)
        with torch.autocast("cpu", enabled=False):
            for rows, before, _, weights in _blocks(query, key, lengths, scale):
                by_key[:, :, rows] = (weights @ value[:, before]).view(by_key[:, :, rows].shape)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        d_query = torch.empty_like(query)
        # Sums over blocks are float32, so that their rounding does not grow with the sample.
        d_key, d_value = (torch.zeros(t.shape, dtype=torch.float32) for t in (key, value))
        d_output, into = _by_key_head(gradient[0].transpose(0, 1), key), _by_key_head(d_query, key)
        with torch.autocast("cpu", enabled=False):
            for rows, before, asking, weights in _blocks(query, key, ctx.lengths, ctx.scale):
                d_mixed = d_output[:, :, rows].reshape(len(key), -1, value.shape[-1])
                d_value[:, before] += weights.mT @ d_mixed
                d_weights = d_mixed @ value[:, before].mT
                d_scores = softmax_gradient(d_weights, weights)
                d_key[:, before] += d_scores.mT @ asking
                into[:, :, rows] = (d_scores @ key[:, before]).mul_(ctx.scale).view(into[:, :, rows].shape)
        return d_query, d_key.mul_(ctx.scale).to(key.dtype), d_value.to(value.dtype), None, None


def _by_key_head(tensor: Tensor, key: Tensor) -> Tensor:
    """Returns [heads, T, width] as [key heads, heads that share one, T, width]."""
    return tensor.unflatten(0, (len(key), -1))


def _blocks(
    query: Tensor, key: Tensor, lengths: Sequence[int], scale: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yields (place of a block in the row, that of its keys, its queries, the attention weights) of each;
    queries: [key heads, those of all heads that share a key head, width]; weights: [..., keys]."""
    by_key, wide = _by_key_head(query, key), key.float()
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu_(1)
    first = 0
    for length in lengths:
        for start in range(0, length, BLOCK):
            size = min(BLOCK, length - start)
            rows, before = slice(first + start, first + start + size), slice(first, first + start + size)
            asking = by_key[:, :, rows].reshape(len(key), -1, query.shape[-1])
            # scaled in float32: most scales are no power of two, and bf16 would round each query
            scores = (asking.float() * scale) @ wide[:, before].mT
            block = scores.unflatten(1, (-1, size))[..., start:]
            block.masked_fill_(later[:size, :size], float("-inf"))
            yield rows, before, asking, scores.softmax(-1).to(query.dtype)
        first += length
