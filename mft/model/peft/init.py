"""Adapters as they begin: in float32, and, where they began as a part of the base, remembered for saving.

PiSSA and OLoRA take a part out of each weight, W = W' + s B0 A0, and train on from there. What is saved must work on
the released W, so it is the difference: W' + s B A = W + s (B A - B0 A0), an ordinary adapter of twice the rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

START = "mft_start"
"""Attribute of a peft model with the first weights of its adapters."""


def in_float32(model: nn.Module) -> nn.Module:
    """Returns the model with everything trained in float32: peft leaves modules trained whole in the base's dtype."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32 and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def remember(model: Any) -> None:
    """Keeps a copy of the fresh adapters of a peft model."""
    weights = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if ".lora_" in n}
    setattr(model, START, weights)


def difference(model: Any, state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the state dict of a peft model with adapters that work on the base as released, and the values of
    adapter_config.json that then differ; both are unchanged where nothing was taken out of the base."""
    import torch

    first: dict[str, torch.Tensor] = getattr(model, START, {})
    if not first:
        return state_dict, {}
    found = dict(state_dict)
    for name, begun in first.items():
        trained, axis = state_dict[name], 0 if ".lora_A." in name else 1
        sign = 1 if axis == 0 else -1
        found[name] = torch.cat([trained, sign * begun.to(trained)], axis)
    config = model.peft_config["default"]
    scale = 2**0.5 if config.use_rslora else 2
    return found, {"r": 2 * config.r, "lora_alpha": scale * config.lora_alpha, "init_lora_weights": True}
