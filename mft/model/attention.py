"""Attention sample by sample over one row of samples, so that no mask of a packed row is ever made.

Each function is registered with transformers under its own name and is the ordinary attention of that
name's kind until a forward is given a `packed_row`: answering, with its cache and left padding, is untouched.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import eager_mask, sdpa_mask

from mft.model import fast_attention
from mft.model.introspect import recurrent
from mft.model.packed_row import causal_mask, per_sample
from mft.model.transformers_private import attends_by_registry, attention_name, is_stateful

FAST, SDPA, EAGER, ALIBI = "mft_fast", "mft_sdpa", "mft_eager", "mft_alibi"
PER_SAMPLE = {"sdpa": SDPA, FAST: SDPA, SDPA: SDPA, "eager": EAGER, EAGER: EAGER, ALIBI: ALIBI}
"""The name that attends per sample, for each that has one."""

LAYER_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that `per_sample` computes."""


def attend_per_sample(base: PreTrainedModel, fast: bool = True) -> bool:
    """Sets a loaded model to attend sample by sample in training and returns whether it now does.

    fast: by the fastest kernel that equals sdpa, where the model has sdpa (see `fast_attention`).

    Left as they are: flash attention, which is given the row's samples as arguments, and models that do not
    go through transformers' interface (codegen), that have layers of another kind than attention, or that
    scale queries by their place in the row (llama 4). They get transformers' block mask.
    """
    config, name = base.config, attention_name(base)
    kinds = set(getattr(config, "layer_types", None) or ())
    if recurrent_layers(base) or name not in PER_SAMPLE or not attends_by_registry(base):
        return False
    if not kinds <= LAYER_KINDS or getattr(config, "attn_temperature_tuning", False):
        return False
    wanted = FAST if fast and PER_SAMPLE[name] == SDPA else PER_SAMPLE[name]
    base.set_attn_implementation(wanted)
    return attention_name(base) == wanted


def recurrent_layers(base: PreTrainedModel) -> str:
    """Returns which layers of a loaded model carry a state from token to token beside attention, "" if none
    do."""
    return recurrent(base.config.to_dict()) or ("recurrent layers" if is_stateful(base) else "")


def described(base: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Returns what computes the attention of a loaded model on a device and in a computing dtype, for
    people."""
    name = attention_name(base)
    if name == FAST:
        said = (fast_attention.described(device, dtype, widths) for widths in head_widths(base) or [(0, 0)])
        return "; ".join(dict.fromkeys(said))
    ours = {SDPA: "sdpa", EAGER: "eager", ALIBI: "ALiBi on sdpa"}
    return f"{ours[name]}, sample by sample" if name in ours else name


def head_widths(base: PreTrainedModel) -> list[tuple[int, int]]:
    """Returns the widths of a head's keys and of its values, of each layer where they differ (gemma 4); []
    where no one config has them (BLT)."""
    config: Any = base.config.get_text_config()
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    found = []
    for layer in layers:
        if not getattr(layer, "num_attention_heads", None):
            return []
        width = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None)
        width = width or layer.hidden_size // layer.num_attention_heads
        found.append((width, getattr(layer, "v_head_dim", None) or width))
    return found


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
    slope_h = alibi_slopes(query.shape[1], query.device)
    place_k = torch.arange(key.shape[2], device=query.device, dtype=torch.float32)
    bias = (slope_h[:, None, None] * (place_k - place_k[-1])).to(query.dtype)[None]
    masked = (bias + additive(mask, query, key)).clamp_(min=torch.finfo(query.dtype).min)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output = F.scaled_dot_product_attention(query, key, value, masked, dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@functools.cache
def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Returns the slope of each head [heads], float32, once for all layers: powers of 2**(-8/n) for n heads,
    n the power of two below; the heads left over take every second power of 2**(-8/2n)."""
    n = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n) + 1, 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


for _name, _attend, _mask in (
    (FAST, fast_attention.fastest, sdpa_mask),
    (SDPA, fast_attention.sdpa_by_sample, sdpa_mask),
    (EAGER, per_sample(eager), eager_mask),
    (ALIBI, per_sample(alibi), eager_mask),
):
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, _mask)
