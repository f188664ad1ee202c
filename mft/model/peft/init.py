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


def in_float32(model: nn.Module) -> None:
    """Casts everything that is trained to float32; peft leaves modules_to_save in the base's dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def remember_init(model: Any) -> None:
    """Keeps a copy of the adapters of a peft model as they were initialised."""
    weights = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if ".lora_" in n}
    setattr(model, INITIAL, weights)


def relative_to_base(
    model: Any, state_dict: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the state dict of a peft model with adapters that work on the base as released, and the values
    of adapter_config.json that then differ; both are unchanged where nothing was taken out of the base.

    peft's own conversion (path_initial_model_for_weight_conversion) reads the first adapters from a folder,
    which would have to be written before the first step.
    """
    import torch

    initial: dict[str, torch.Tensor] = getattr(model, INITIAL, {})
    if not initial:
        return state_dict, {}
    exported = dict(state_dict)
    # B A - B0 A0 = [B, -B0] @ [[A], [A0]]: A is stacked on A0 along the rank, B stands beside -B0.
    for name, first in initial.items():
        trained = state_dict[name]
        first = first.to(trained)
        is_a = ".lora_A." in name
        exported[name] = torch.cat([trained, first], 0) if is_a else torch.cat([trained, -first], 1)
    config = model.peft_config["default"]
    scale = 2**0.5 if config.use_rslora else 2
    return exported, {"r": 2 * config.r, "lora_alpha": scale * config.lora_alpha, "init_lora_weights": True}
