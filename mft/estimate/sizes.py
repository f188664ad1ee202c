"""The sizes of a model's weights, by what engines divide: its layers, and what is in none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Parts = dict[str, float]
"""Bytes by part."""


@dataclass(frozen=True)
class Unit:
    """A decoder layer, or all that is in none: what is gathered at a time."""

    trained: int
    """Weights that are trained."""
    frozen: int
    """Bytes of those that are neither trained nor packed."""
    packed: int
    """Bytes of quantised ones, with their scales."""
    largest: int = 0
    """Weights in the largest trained matrix."""
    small: int = 0
    """Bytes of those weights that ZeRO-3 keeps whole, as they are computed with."""


@dataclass(frozen=True)
class Model:
    """What engines divide."""

    layers: list[Unit]
    outside: Unit
    """Embedding, head and what else is in no layer."""
    looked_up: int = 0
    """Bytes of an embedding that is frozen and not the head too: no backward pass needs it."""

    @property
    def units(self) -> list[Unit]:
        return [*self.layers, self.outside]

    @property
    def trained(self) -> int:
        return sum(unit.trained for unit in self.units)

    @property
    def frozen(self) -> int:
        return sum(unit.frozen for unit in self.units)

    @property
    def packed(self) -> int:
        return sum(unit.packed for unit in self.units)

    @property
    def small(self) -> int:
        return sum(unit.small for unit in self.units)

    @property
    def largest(self) -> int:
        return max(unit.largest for unit in self.units)


def units(
    model: Any, classes: list[str], size: Callable[[Any], int], kept_whole: Callable[[Any], int]
) -> Model:
    """Returns the sizes of a model's layers, and of what is outside them.

    size: bytes of a frozen weight; kept_whole: bytes of a weight that is not divided, 0 of any other.
    """
    from mft.model.introspect import base_of, is_tied

    layers: list[Any] = []
    nested: set[int] = set()
    for part in model.modules():  # outer ones first
        if type(part).__name__ in classes and id(part) not in nested:
            layers.append(part)
            nested |= {id(inner) for inner in part.modules()}
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    base = base_of(model)
    table = base.get_input_embeddings().weight
    frozen = not table.requires_grad and not is_tied(base) and table.is_floating_point()
    return Model(
        layers=[_unit(layer.parameters(), size, kept_whole) for layer in layers],
        outside=_unit(outside, size, kept_whole),
        looked_up=size(table) - kept_whole(table) if frozen else 0,
    )


def _unit(parameters: Iterable[Any], size: Callable[[Any], int], kept_whole: Callable[[Any], int]) -> Unit:
    from mft.model.introspect import full_shape
    from mft.model.peft.targets import packed

    trained = frozen = quantised = largest = small = 0
    for parameter in parameters:
        count = math.prod(full_shape(parameter))
        small += kept_whole(parameter)
        if parameter.requires_grad:
            trained, largest = trained + count, max(largest, count)
        elif packed(parameter):
            quantised += size(parameter)
        else:
            frozen += size(parameter)
    return Unit(trained, frozen, quantised, largest, small)


def experts(model: Any, size: Callable[[Any], int]) -> tuple[int, int]:
    """Returns the routed experts of a model: weights that are trained, and bytes of frozen ones."""
    from mft.model.peft.targets import roles, weights

    every = list(weights(model))
    role = roles({path: shape for path, _, shape in every if ".lora_" not in path})
    experts = [p for path, p, _ in every if role.get(path) == "experts"]
    trained = sum(p.numel() for p in experts if p.requires_grad)
    return trained, sum(size(p) for p in experts if not p.requires_grad)


def set_experts_apart(parts: Parts, experts: tuple[int, int], model: Model) -> None:
    """Moves the experts' part of weights to a part of their own."""
    for name, of_experts, every in (
        ("weights", experts[0], model.trained),
        ("frozen", experts[1], model.frozen),
    ):
        if of_experts and name in parts:
            moved = parts[name] * of_experts / every
            parts["experts"] = parts.get("experts", 0.0) + moved
            parts[name] -= moved
