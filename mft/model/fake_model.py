"""A model of fake tensors, which have shapes and no values, with one layer of each kind: what it computes can
be watched in a moment, whatever the model's size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from mft.model.introspect import base_of, full_shape


@dataclass(frozen=True)
class Shortened:
    """A copy of a model in which layers are left out."""

    model: nn.Module
    layers: list[nn.Module]
    """Those that stayed."""
    stands_in: list[int]
    """For each layer of the whole model the number of the one, of those that stayed, that is like it."""


def shorten(model: nn.Module, classes: list[str]) -> Shortened:
    """Returns a copy of a model with its first layer, its last, and the first of each kind between them; the
    weights are the model's own.

    classes: names of the layers' classes. A kind is a class with the same weights, of which the same are
    trained, with the same attention, and both or neither recomputed. Raises ValueError for a model whose
    layers are not in one list.
    """
    lists = [
        (f"{place}.{name}".lstrip("."), parent, name, part)
        for place, parent in model.named_modules()
        for name, part in parent.named_children()
        if isinstance(part, nn.ModuleList) and len(part) and type(part[0]).__name__ in classes
    ]
    if len(lists) != 1:
        raise ValueError(f"the layers {classes} are in {len(lists)} lists")
    path, parent, name, every = lists[0]
    config = base_of(model).config.get_text_config()
    types = list(getattr(config, "layer_types", None) or [])
    kinds = [_kind(layer, types[i] if i < len(types) else "") for i, layer in enumerate(every)]
    last = len(kinds) - 1
    chosen = sorted({0, last} | {kinds.index(kind, 1) for kind in kinds[1:last]})
    place = {number: i for i, number in enumerate(chosen)}
    stands_in = [place[n] if n in (0, last) else place[kinds.index(kind, 1)] for n, kind in enumerate(kinds)]
    of_weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    setattr(parent, name, nn.ModuleList(every[number] for number in chosen))
    try:
        short = copy.deepcopy(model, of_weights)
    finally:
        setattr(parent, name, every)
    layers = list(short.get_submodule(path).children())
    config = base_of(short).config.get_text_config()
    for new, layer in enumerate(layers):
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = new  # type: ignore[assignment]
    if types:
        _set_layer_types(config, [types[number] for number in chosen])
    return Shortened(short, layers, stands_in)


def _set_layer_types(config: Any, types: list[str]) -> None:
    """Sets them also where the class computes them from other fields."""
    kind = type(config)
    name = kind.attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(kind, name, None), property):
        config.__class__ = type(kind.__name__, (kind,), {name: types})
    else:
        config.layer_types = types


def _kind(layer: nn.Module, attention: str) -> tuple[Any, ...]:
    weights = [(name, tuple(full_shape(p)), p.requires_grad) for name, p in layer.named_parameters()]
    return type(layer), attention, getattr(layer, "gradient_checkpointing", False), tuple(weights)


def make_fake(model: nn.Module, trained: torch.dtype | None, frozen: torch.dtype | None) -> None:
    """Gives a model on the meta device fake weights and buffers, within a FakeTensorMode, in place.

    trained, frozen: dtypes of the floating-point weights, None = as they are.
    """
    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    module: Any
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            # packed weights are no matter of shapes
            module.forward = partial(quantised_linear, module, module.out_features)
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            if id(weight) not in made:
                dtype = (trained if weight.requires_grad else frozen) or weight.dtype
                dtype = dtype if weight.is_floating_point() else weight.dtype
                made[id(weight)] = nn.Parameter(
                    torch.empty(weight.shape, dtype=dtype, device="cpu"), weight.requires_grad
                )
            module._parameters[name] = made[id(weight)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        # the other kinds look at the positions, and take as much
        if isinstance(rope := getattr(module, "rope_type", "default"), dict):
            module.rope_type = dict.fromkeys(rope, "default")  # by kind of layer
        elif rope != "default":
            module.rope_type = "default"


class Dequantised(torch.autograd.Function):
    """x [..., I] → y [..., O] of a quantised weight, which is dequantised for each of the two passes.

    keeps: whether x is kept for the backward pass, without need, as that of 8 bits does it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, outputs: int, keeps: bool) -> torch.Tensor:
        ctx.inputs, ctx.kept = x.shape[-1], x if keeps else None
        return F.linear(x, x.new_empty(outputs, x.shape[-1]))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ gradient.new_empty(gradient.shape[-1], ctx.inputs), None, None


def quantised_linear(layer: Any, outputs: int, x: torch.Tensor) -> torch.Tensor:
    """Computes a layer of bitsandbytes, of whatever values."""
    dtype = getattr(layer, "compute_dtype", None) or x.dtype
    y: torch.Tensor = Dequantised.apply(x.to(dtype), outputs, type(layer).__name__ == "Linear8bitLt")
    return (y if layer.bias is None else y + layer.bias.to(dtype)).to(x.dtype)


class GroupedProduct(torch.autograd.Function):
    """x [n, I], weights [E, I, O] → [n, O], of whatever values: torch's own takes no fake tensors of float32
    on a CPU. Like it, this keeps x only where the weights are trained."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return x.new_empty(x.shape[0], weight.shape[-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        _, weight = ctx.saved_tensors
        rows, columns = ctx.needs_input_grad
        dx = gradient.new_empty(gradient.shape[0], weight.shape[1]) if rows else None
        return dx, torch.empty_like(weight) if columns else None


def grouped_product(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Stands in for the product of groups of rows with a matrix each, in transformers; offs: where they end."""
    product: torch.Tensor = GroupedProduct.apply(x.to(weight.dtype), weight)
    return product
