"""The matrix work of training on a token, counted from the shapes of whole weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mft.model.introspect import base_of
from mft.model.peft.targets import active_shares, weights

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of a token in one training step: for each weight 2 forward, 2 back through the activations, and 2
    more if it is trained (Kaplan et al. 2020, section 2.1)."""

    trained: float
    """6 for each trained weight."""
    frozen: float
    """4 for each frozen weight."""
    recomputed: float = 0.0
    """2 for each weight of a layer whose activations are made again in the backward pass."""

    @property
    def model(self) -> float:
        """What model FLOPs utilization (MFU) counts; the hardware's (HFU) counts recomputation, too."""
        return self.trained + self.frozen


def token_flops(model: nn.Module, layer_classes: list[str], every: int) -> TokenFlops:
    """Returns the work of a model, plain or peft, that no engine has prepared.

    A weight counts as a whole, also if it is packed to 4 bits, divided by ZeRO-3, or not read by this rank;
    of routed experts, and of their adapters, as many as a token goes to. Left out are the embedding table,
    which is looked up, the quadratic part of attention, and the head's recomputation.

    layer_classes: names of the decoder layers' classes; every: of so many layers one is recomputed, 0 = none.
    """
    from torch import nn

    # an embedding is a look-up, unless it is tied to the head, which multiplies by it
    looked_up, multiplied = set(), set()
    for part in model.modules():
        own = {id(parameter) for parameter in part.parameters(recurse=False)}
        looked_up |= own if isinstance(part, nn.Embedding) else set()
        multiplied |= own if hasattr(part, "out_features") else set()
    layers = [part for part in model.modules() if type(part).__name__ in layer_classes]
    again = {id(p) for layer in (layers[::every] if every else []) for p in layer.parameters()}
    every_weight = list(weights(model))
    shapes = {path: shape for path, _, shape in every_weight}
    active = active_shares(shapes, base_of(model).config.get_text_config())
    sums = {"trained": 0.0, "frozen": 0.0, "recomputed": 0.0}
    for path, parameter, shape in every_weight:
        if len(shape) < 2 or id(parameter) in looked_up - multiplied:
            continue
        count = math.prod(shape) * active[path]
        kind, each = ("trained", 6) if parameter.requires_grad else ("frozen", 4)
        sums[kind] += each * count
        sums["recomputed"] += 2 * count * (id(parameter) in again)
    return TokenFlops(**sums)
