"""Adapter initialisation (PiSSA, OLoRA), and export relative to the original base.

PiSSA and OLoRA take a part out of each weight, W = W' + s B0 A0, and train on from there. What is saved must
work on the released W, so it is the difference: W' + s B A = W + s (B A - B0 A0), an ordinary adapter of
twice the rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

INITIAL = "mft_initial_adapters"
"""Attribute of a peft model: its adapters as they were initialised."""


def in_float32(model: nn.Module) -> nn.Module:
    """Returns the model with everything trained in float32; peft leaves modules_to_save in the base's
    dtype."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32 and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def remember_init(model: Any) -> None:
    """Keeps a copy of the adapters of a peft model as they were initialised."""
    weights = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if ".lora_" in n}
    setattr(model, INITIAL, weights)


def relative_to_base(
    model: Any, state_dict: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the state dict of a peft model with adapters that work on the base as released, and the values
    of adapter_config.json that then differ; both are unchanged where nothing was taken out of the base."""
    import torch

    initial: dict[str, torch.Tensor] = getattr(model, INITIAL, {})
    if not initial:
        return state_dict, {}
    exported = dict(state_dict)
    # B A - B0 A0 = [B, -B0] @ [[A], [A0]]: the A matrices are stacked along the rank, the B matrices beside
    # each other
    for name, first in initial.items():
        trained, axis = state_dict[name], 0 if ".lora_A." in name else 1
        sign = 1 if axis == 0 else -1
        exported[name] = torch.cat([trained, sign * first.to(trained)], axis)
    config = model.peft_config["default"]
    scale = 2**0.5 if config.use_rslora else 2
    return exported, {"r": 2 * config.r, "lora_alpha": scale * config.lora_alpha, "init_lora_weights": True}
