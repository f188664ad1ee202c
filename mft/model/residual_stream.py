"""Keeps the hidden states of a model with float32 weights in bf16 where autocast computes in bf16.

Autocast leaves embeddings and the products of norms with their weights in float32. One such tensor makes the
whole residual stream float32: twice the memory of activations, and casts before every matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def follow_autocast(base: PreTrainedModel) -> None:
    """Makes embeddings and norms of a loaded model return what autocast computes in, where that is bf16.

    Weights, their gradients and the statistics of norms stay float32, and so does all of it without autocast.
    Under fp16 it stays as it is: the residual stream of some models leaves fp16's range.
    """
    for module in {base.get_input_embeddings(), *_embeddings_and_norms(base)}:
        module.register_forward_hook(_in_autocast_dtype)


def _embeddings_and_norms(base: PreTrainedModel) -> Iterator[nn.Module]:
    for module in base.modules():
        own = list(module.parameters(recurse=False))
        is_norm = bool(own) and all(weight.dim() == 1 for weight in own) and not any(module.children())
        if isinstance(module, nn.Embedding) or is_norm:
            yield module


def _in_autocast_dtype(module: nn.Module, arguments: Any, output: Any) -> Any:
    if not isinstance(output, torch.Tensor) or output.dtype != torch.float32:
        return output
    kind = output.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        return output.to(torch.bfloat16)
    return output
