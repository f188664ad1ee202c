"""The native classes that original checkpoints load into, and how their weights are renamed and split on the way.

The conversions are transformers' own kind, keyed to a subclass for each original format. A loaded model is given back
its plain class, so that what is trained and saved is native and carries no memory of the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GlmForCausalLM,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from mft.model.attention import ALIBI

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


class SplitQkv(ConversionOps):
    """Rows of a joint projection -> queries, keys, values. per_head: the rows are [heads, 3, width], else all queries
    first. Sizes come from the config: under ZeRO-3 the model's own parameters are empty."""

    def __init__(self, per_head: bool = False):
        self.per_head = per_head

    @torch.no_grad()
    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        config = kwargs["config"]
        (joint,) = (t[0] if isinstance(t, list) else t for t in input_dict.values())
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        if joint.shape[0] != (heads + 2 * groups) * width:  # parts of wrong shapes, which are refused by name
            parts = list(joint.tensor_split(3))
        elif self.per_head:
            rows = joint.reshape(heads, 3, width, *joint.shape[1:])
            parts = [rows[:, i].reshape(heads * width, *joint.shape[1:]) for i in range(3)]
        else:
            parts = [p.contiguous() for p in joint.split([heads * width, groups * width, groups * width])]
        return dict(zip(target_patterns, parts, strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("original formats are read, not written")


class AlibiConfig(SmolLM3Config):
    """A llama without rotary positions whose attention has linear biases instead."""

    model_type = "mft_alibi"


class AlibiForCausalLM(SmolLM3ForCausalLM):
    """Baichuan-13B's architecture; transformers has none with ALiBi, RMSNorm and SwiGLU.

    Its own model type makes a library that lacks this class refuse a saved folder, instead of leaving the positions
    out without a word.
    """

    config_class = AlibiConfig
    _supports_flash_attn = False

    def _check_and_adjust_attn_implementation(self, *args: Any, **kwargs: Any) -> str:
        return ALIBI


class NormHead(nn.Linear):
    """An output layer whose rows are scaled to length 1 in the forward pass; its weight is the one as stored."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, F.normalize(self.weight), self.bias)


def plain_rows(base: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict as a plain model needs it: the rows of a NormHead, or of a trained copy, scaled to length 1.

    Under a NormHead they mean the same.
    """
    if not any(isinstance(module, NormHead) for module in base.modules()):
        return state_dict
    is_head = re.compile(r"(^|\.)lm_head\.(modules_to_save\.\w+\.|original_module\.)?weight$")
    return {name: F.normalize(t) if is_head.search(name) else t for name, t in state_dict.items()}


# Importing this module is all that AutoConfig and AutoModelForCausalLM need to load a saved folder of this type.
AutoConfig.register(AlibiConfig.model_type, AlibiConfig, exist_ok=True)
AutoModelForCausalLM.register(AlibiConfig, AlibiForCausalLM, exist_ok=True)


class OriginalChatGLMForCausalLM(GlmForCausalLM):
    """chatglm2, chatglm3, codegeex2 on disk."""


class OriginalChatGLMPerHeadForCausalLM(GlmForCausalLM):
    """The same without multi-query attention, its joint projection in rows per head."""


class OriginalQwenForCausalLM(Qwen2ForCausalLM):
    """Qwen (v1) on disk."""


class OriginalBaichuanForCausalLM(LlamaForCausalLM):
    """Baichuan-7B and Baichuan2-7B on disk."""


class OriginalBaichuanAlibiForCausalLM(AlibiForCausalLM):
    """Baichuan-13B and Baichuan2-13B on disk."""


class OriginalAquilaForCausalLM(LlamaForCausalLM):
    """Aquila2 on disk: names are llama's."""


def _chatglm(per_head: bool) -> list[Any]:
    return [
        WeightRenaming("transformer.embedding.word_embeddings", "model.embed_tokens"),
        WeightRenaming("transformer.output_layer", "lm_head"),
        WeightRenaming("transformer.encoder.final_layernorm", "model.norm"),
        WeightRenaming("transformer.encoder.layers", "model.layers"),
        WeightRenaming("self_attention.dense", "self_attn.o_proj"),
        WeightRenaming("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
        WeightRenaming("mlp.dense_4h_to_h", "mlp.down_proj"),
        WeightConverter("self_attention.query_key_value", QKV, [SplitQkv(per_head)]),
    ]


BAICHUAN: list[Any] = [WeightConverter("self_attn.W_pack", QKV, [SplitQkv()])]
QWEN: list[Any] = [
    WeightRenaming("transformer.wte", "model.embed_tokens"),
    WeightRenaming("transformer.ln_f", "model.norm"),
    WeightRenaming("transformer.h", "model.layers"),
    WeightRenaming("ln_1", "input_layernorm"),
    WeightRenaming("ln_2", "post_attention_layernorm"),
    WeightRenaming("attn.c_proj", "self_attn.o_proj"),
    WeightRenaming("mlp.w1", "mlp.up_proj"),
    WeightRenaming("mlp.w2", "mlp.gate_proj"),
    WeightRenaming("mlp.c_proj", "mlp.down_proj"),
    WeightConverter("attn.c_attn", QKV, [SplitQkv()]),
]

READS: dict[Any, list[Any]] = {
    OriginalChatGLMForCausalLM: _chatglm(per_head=False),
    OriginalChatGLMPerHeadForCausalLM: _chatglm(per_head=True),
    OriginalQwenForCausalLM: QWEN,
    OriginalBaichuanForCausalLM: BAICHUAN,
    OriginalBaichuanAlibiForCausalLM: BAICHUAN,
}
for _class, _mapping in READS.items():
    register_checkpoint_conversion_mapping(_class.__name__, _mapping, overwrite=True)
    # buffers of the original code that the released files carry
    _class._keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"rotary_pos_emb\.inv_freq"]
OriginalAquilaForCausalLM._keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]


def original_names(reader: Any, stored: Iterable[str]) -> dict[str, str]:
    """Returns the name in the checkpoint of every native weight that a class of READS makes of the weights `stored`."""
    found: dict[str, str] = {}
    for name in stored:
        native, parts = name, [""]
        for step in READS.get(reader, []):
            native, matched = step.rename_source_key(native)
            if matched and len(step.target_patterns) > 1:
                parts = step.target_patterns
        found |= {native.replace(parts[0], part): name for part in parts}
    return found
