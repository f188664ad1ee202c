"""Gradient checkpointing: recompute activations in backward instead of keeping them, a third of the memory at
0.7 of the speed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest
from mft.model.introspect import base_of, parameter_count

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

AUTO_ABOVE = 1_000_000_000
"""Parameters above which gradient_checkpointing=auto turns it on."""


def resolve(setting: Any, parameters: int) -> bool:
    """Returns auto | true | false for a model of that many parameters; UserError for anything else."""
    options = {"auto": parameters > AUTO_ABOVE, "true": True, "false": False}
    value = str(setting).lower()
    if value not in options:
        raise UserError(
            f"model.gradient_checkpointing={setting!r} is not one of auto, true, "
            f"false{nearest(value, options)}"
        )
    return options[value]


def turn_on(model: nn.Module, setting: Any) -> bool:
    """Turns it on where the setting says so, on a plain or peft model, and returns whether it is on.

    Raises UserError where true asks for it and the model cannot; auto warns.
    """
    base = base_of(model)
    on = resolve(setting, parameter_count(model))
    if on and not base.supports_gradient_checkpointing:
        name = type(base).__name__
        if str(setting).lower() == "true":
            raise UserError(f"model.gradient_checkpointing=true: {name} does not support it; choose false")
        log.warning("model.gradient_checkpointing=auto is off: %s does not support it", name)
        return False
    if on:
        # Non-reentrant: the reentrant kind loses gradients of adapters behind a frozen embedding and breaks
        # DDP.
        base.activation_checkpointing_enable({"use_reentrant": False})
    return on
