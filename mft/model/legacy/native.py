"""Native classes that transformers lacks: a decoder with ALiBi (Baichuan-13B), a normalising output layer
(Baichuan 2).

Importing this module, also under its older name `mft.model.native`, is all that AutoConfig and
AutoModelForCausalLM need to load a saved folder of the type `mft_alibi`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from mft.model.attention import ALIBI


class AlibiConfig(SmolLM3Config):
    """A llama without rotary positions whose attention has linear biases instead."""

    model_type = "mft_alibi"


class AlibiForCausalLM(SmolLM3ForCausalLM):
    """Baichuan-13B's architecture; transformers has none with ALiBi, RMSNorm and SwiGLU.

    Its own model type makes a library that lacks this class refuse a saved folder, instead of leaving the
    positions out silently.
    """

    config_class = AlibiConfig
    _supports_flash_attn = False

    def _check_and_adjust_attn_implementation(self, *args: Any, **kwargs: Any) -> str:
        return ALIBI


NORM_HEAD = "mft_norm_head"
"""Key of config.json, in the cache only: the rows of the output layer are to be scaled to length 1."""


class NormHead(nn.Linear):
    """An output layer whose rows are scaled to length 1 in the forward pass; its weight is the one as
    stored."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, F.normalize(self.weight), self.bias)


def restore_norm_head(model: Any) -> None:
    """Makes the output layer of a loaded model what its config.json says it is."""
    if getattr(model.config, NORM_HEAD, False):
        model.get_output_embeddings().__class__ = NormHead


def plain_rows(base: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict as a plain model needs it: the rows of a NormHead, or of a trained copy, scaled to
    length 1.

    Under a NormHead they mean the same.
    """
    if not any(isinstance(module, NormHead) for module in base.modules()):
        return state_dict
    is_head = re.compile(r"(^|\.)lm_head\.(modules_to_save\.\w+\.|original_module\.)?weight$")
    return {name: F.normalize(t) if is_head.search(name) else t for name, t in state_dict.items()}


AutoConfig.register(AlibiConfig.model_type, AlibiConfig, exist_ok=True)
AutoModelForCausalLM.register(AlibiConfig, AlibiForCausalLM, exist_ok=True)
