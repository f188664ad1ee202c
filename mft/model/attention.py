"""Attention sample by sample over one row of samples, so that no mask of a packed row is ever made.

Each function is registered with transformers under its own name and is the ordinary attention of that
name's kind until a forward is given `sample_lengths`: answering, with its cache and left padding, is
untouched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from mft.model.introspect import recurrent
from mft.model.transformers_private import attends_by_registry, attention_name, is_stateful

SDPA, EAGER, ALIBI = "mft_sdpa", "mft_eager", "mft_alibi"
PER_SAMPLE = {"sdpa": SDPA, SDPA: SDPA, "eager": EAGER, EAGER: EAGER, ALIBI: ALIBI}
"""The name that attends per sample, for each that has one."""

LAYER_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that `per_sample` computes."""


def attend_per_sample(base: PreTrainedModel) -> bool:
    """Sets a loaded model to attend sample by sample in training and returns whether it now does.

    Left as they are: flash attention, which does the same on its own, and models that do not go through
    transformers' interface (codegen), that have layers of another kind than attention, or that scale queries
    by their place in the row (llama 4). They get transformers' block mask.
    """
    config, name = base.config, attention_name(base)
    kinds = set(getattr(config, "layer_types", None) or ())
    if recurrent_layers(base) or name not in PER_SAMPLE or not attends_by_registry(base):
        return False
    if not kinds <= LAYER_KINDS or getattr(config, "attn_temperature_tuning", False):
        return False
    base.set_attn_implementation(PER_SAMPLE[name])
    return attention_name(base) == PER_SAMPLE[name]


def recurrent_layers(base: PreTrainedModel) -> str:
    """Returns which layers of a loaded model carry a state from token to token beside attention, "" if none
    do."""
    return recurrent(base.config.to_dict()) or ("recurrent layers" if is_stateful(base) else "")


def described(base: PreTrainedModel) -> str:
    """Returns what computes the attention of a loaded model, for people."""
    name = attention_name(base)
    ours = {SDPA: "sdpa", EAGER: "eager", ALIBI: "ALiBi on sdpa"}
    return f"{ours[name]}, sample by sample" if name in ours else name


def row_of_samples(lengths: list[int], cu_seqlens: Tensor) -> dict[str, Any]:
    """Returns the arguments of a decoder's forward that keep apart the samples of one row.

    lengths: tokens of each sample; cu_seqlens: int32 [N + 1], where each begins, on the device. The 4-D mask
    is a stand-in: transformers passes such a mask on as it is instead of making one, and nothing reads it.
    """
    return {
        "attention_mask": cu_seqlens.new_zeros((1, 1, 1, 1), dtype=torch.bool),
        "sample_lengths": lengths,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def per_sample(attend: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    """Returns `attend` (a function of transformers' interface that is causal where its mask is None) made to
    go sample by sample where it is given `sample_lengths`."""

    def forward(
        module: Any,
        query: Tensor,  # [B, heads, T, head width]
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sample_lengths: list[int] | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, Any]:
        if sample_lengths is None:
            return attend(module, query, key, value, attention_mask, **arguments)
        lengths = sample_lengths
        kinds = getattr(module.config, "layer_types", None)
        if kinds and kinds[module.layer_idx] == "chunked_attention":
            chunk = module.config.attention_chunk_size
            lengths = [min(chunk, n - i) for n in lengths for i in range(0, n, chunk)]
        window = arguments.get("sliding_window")
        parts = []
        # split, not slices: its backward joins the gradients at once, where each slice would make a full-size
        # one.
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
            mask = None
            if window and q.shape[2] > window:  # the last `window` keys up to the query
                mask = causal_mask(q, k).triu(1 - window)
            parts.append(attend(module, q, k, v, mask, **arguments)[0])
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None

    return forward


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Returns the mask [1, 1, queries, keys] that is True up to each query's own place."""
    shape = (1, 1, query.shape[2], key.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


def additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Returns a mask as a float tensor to add to the scores; None is a causal one."""
    mask = causal_mask(query, key) if mask is None else mask
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    return zeros.masked_fill_(~mask, torch.finfo(query.dtype).min)


def eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, Any]:
    """The model's own eager attention, with what sdpa cannot do: gemma 2's soft cap, the sinks of gpt-oss."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, additive(mask, query, key), **arguments)


def alibi(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention with linear biases: each head adds slope x key position to its scores.

    slope x (key - query) differs from it by a constant per query, which the softmax takes out; so a key's
    place in the row serves as its position, whatever stands before it.
    """
    slope_h = alibi_slopes(query.shape[1]).to(query.device)
    place_k = torch.arange(key.shape[2], device=query.device, dtype=torch.float32)
    bias = (slope_h[:, None, None] * (place_k - place_k[-1])).to(query.dtype)[None]
    masked = (bias + additive(mask, query, key)).clamp_(min=torch.finfo(query.dtype).min)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output = F.scaled_dot_product_attention(query, key, value, masked, dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def alibi_slopes(heads: int) -> Tensor:
    """Returns the slope of each head [heads], float32: powers of 2**(-8/n) for n heads, n the power of two
    below; the heads left over take every second power of 2**(-8/2n)."""
    n = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n) + 1, 2)]
    return torch.tensor(slopes, dtype=torch.float32)


for _name, _attend, _mask in (
    (SDPA, sdpa_attention_forward, sdpa_mask),
    (EAGER, eager, eager_mask),
    (ALIBI, alibi, eager_mask),
):
    AttentionInterface.register(_name, per_sample(_attend))
    AttentionMaskInterface.register(_name, _mask)
