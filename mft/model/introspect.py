"""Inspects a loaded model: the model beneath peft, what follows its head, how many weights it has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mft.model.peft_private import new_rows

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


RECURRENT = (
    *("bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "minimax", "nemotron_h"),
    *("recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
)
"""Model types with recurrent layers whose config.json may not list its layers."""


def base_of(model: Any) -> Any:
    """Returns the transformers model inside a peft model (adapters stay in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(base: PreTrainedModel) -> Any:
    """Returns what makes the hidden states of a transformers model: the model without its head."""
    decoder = base.get_decoder()
    # llama 4 keeps it under a name that get_decoder does not try
    return base.model if decoder is base else decoder


def head_quirks(base: PreTrainedModel) -> dict[str, float]:
    """Returns what a config does to the logits after the head: granite divides, cohere multiplies, gemma 2
    caps softly."""
    config = base.config.get_text_config()  # a part of it in models that also see: gemma 4
    quirks = {}
    for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"):
        value = getattr(config, name, None)
        # a factor of 1 changes nothing, a soft cap at 1 does
        if isinstance(value, int | float) and (value != 1 or name == "final_logit_softcapping"):
            quirks[name] = float(value)
    return quirks


def head_logits(head: Any, hidden_nH: torch.Tensor) -> torch.Tensor:
    """Returns what an output layer makes of hidden states [n, H]: [n, V].

    peft's adapter of new rows would copy the whole weight at each call; here only their logits are put in.
    """
    if (trained := new_rows(head)) is None:
        return head(hidden_nH)
    import torch

    layer, rows, weight_RH = trained
    logits_nV = layer(hidden_nH)
    new_nR = hidden_nH @ weight_RH.T.to(hidden_nH.dtype)
    index_R = torch.tensor(rows, device=new_nR.device)
    return logits_nV.index_copy(1, index_R, new_nR.to(logits_nV.dtype))


def logits(base: PreTrainedModel, hidden_nH: torch.Tensor) -> torch.Tensor:
    """Returns the logits [n, V] of final hidden states [n, H], as the model's own forward makes them."""
    import torch

    logits_nV = head_logits(base.get_output_embeddings(), hidden_nH)
    for name, value in head_quirks(base).items():
        if name == "logits_scaling":
            logits_nV = logits_nV / value
        elif name == "logit_scale":
            logits_nV = logits_nV * value
        else:
            logits_nV = torch.tanh(logits_nV / value) * value
    return logits_nV


def plain_head(base: PreTrainedModel) -> bool:
    """Whether the logits are `hidden @ weight.T` and nothing else, so that the fused cross entropy may be
    used."""
    from torch import nn

    head = base.get_output_embeddings()
    return type(head) is nn.Linear and head.bias is None and not head_quirks(base)


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Returns the shape of a weight, also when it is packed to 4 bits or sharded by ZeRO-3."""
    state = getattr(parameter, "quant_state", None)
    if state is not None and hasattr(state, "shape"):
        return tuple(state.shape)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_count(model: nn.Module) -> int:
    """Returns the number of weights; those packed to 4 bits or sharded by ZeRO-3 count in full."""
    return sum(math.prod(full_shape(parameter)) for parameter in model.parameters())


def is_tied(base: PreTrainedModel) -> bool:
    """Whether the output layer of a transformers model shares its weight with the embedding."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)


def with_ties(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict with every name of a tied parameter, of which it has one: an engine gathers it
    once."""
    # peft looks for each name that it expects; transformers drops the second of a tied pair on its own
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    complete = dict(state_dict)
    for tied in names.values():
        present = [state_dict[name] for name in tied if name in state_dict]
        for name in tied if present else ():
            complete.setdefault(name, present[0])
    return complete


def recurrent(config: Mapping[str, Any]) -> str:
    """Returns which layers of a model (its config.json) carry something from token to token beside attention,
    "" if none do: a state or a convolution, which no mask keeps from running over the border of two
    samples."""
    config = config.get("text_config") or config  # of a model that also sees
    kinds = [kind for key in ("layer_types", "layers_block_type") for kind in config.get(key) or ()]
    # linear attention is a recurrence by another name
    other = {str(k) for k in kinds if not str(k).endswith("attention") or k == "linear_attention"}
    if other:
        return f"layers of the kind {' and '.join(sorted(other))}"
    return f"the layers of {config['model_type']}" if config.get("model_type") in RECURRENT else ""
