"""A frozen linear layer and its adapter as one autograd function, y = x W' + b + s (x A') B'.

peft computes the same in six steps, each with its own pass over the activations and some with a copy that the
backward pass needs. Here the low-rank product is added into the result, and x and x A' are all that is kept:
layers that read the same x (queries, keys and values; gate and up) keep it once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mft.model.torch_private import has_hooks


class LowRankLinear(torch.autograd.Function):
    """x [..., I], W [O, I] and b [O] without gradients, A [R, I], B [O, R], s → y [..., O].

    x, W and b have one dtype, in which all is computed; A and B may be float32 beside it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        y = F.linear(x, w_OI, bias_O)
        ctx.scale, ctx.dtype = scale, a_RI.dtype
        a_RI, b_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
        low_NR = x.reshape(-1, x.shape[-1]) @ a_RI.T
        y.view(-1, y.shape[-1]).addmm_(low_NR, b_OR.T, alpha=scale)
        ctx.save_for_backward(x, w_OI, low_NR, a_RI, b_OR)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_OI, low_NR, a_RI, b_OR = ctx.saved_tensors
        dx = da_RI = db_OR = None
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dlow_NR = (dy_NO @ b_OR).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            dx = (dy_NO @ w_OI).addmm_(dlow_NR, a_RI).view(x.shape)
        if ctx.needs_input_grad[3]:
            da_RI = (dlow_NR.T @ x.reshape(-1, x.shape[-1])).to(ctx.dtype)
        if ctx.needs_input_grad[4]:
            db_OR = (dy_NO.T @ low_NR).to(ctx.dtype).mul_(ctx.scale)
        return dx, None, None, da_RI, db_OR, None


class FusedLinear(Linear):  # type: ignore[misc]
    """peft's linear layer with an adapter, computed by `LowRankLinear` where that is the same.

    Elsewhere peft's own path is taken; of its casts those are left out that autocast would take back: peft
    casts x to the adapter's float32, from which autocast makes what x was.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on meta
        autocast = autocast and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        if args or kwargs or self.merged or self.disable_adapters or hindrance(self):
            fits = False
        else:
            base, (name,) = self.base_layer, self.active_adapters
            a_RI, b_OR = self.lora_A[name].weight, self.lora_B[name].weight
            fits = base.weight.dtype == dtype and (autocast or a_RI.dtype == b_OR.dtype == dtype)
        if fits:
            y: Tensor = LowRankLinear.apply(
                x.to(dtype), base.weight, base.bias, a_RI, b_OR, self.scaling[name]
            )
            return y
        # DoRA takes norms of weights in x's dtype, and dropout on a CPU rounds its factor to it
        exact = all(isinstance(part, nn.Identity) for part in self.lora_dropout.values()) or kind != "cpu"
        self.cast_input_dtype_enabled = not autocast or bool(self.lora_variant) or not exact
        return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]


def fuse(model: nn.Module) -> None:
    """Lets the linear layers with adapters of a peft model be computed by one function each."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear


OTHER_KINDS = {"Linear": "peft.fused=false", "Linear4bit": "quantised", "Linear8bitLt": "quantised"}
OTHER_KINDS |= {"Embedding": "embedding", "ParamWrapper": "adapters of a bare weight"}
"""Class in peft → why its layers are never fused."""


def hindrance(layer: nn.Module) -> str:
    """Returns why a layer with an adapter is computed by peft's own path, "" where it is not."""
    if not isinstance(layer, FusedLinear):
        return OTHER_KINDS.get(type(layer).__name__, type(layer).__name__)
    base, names = layer.base_layer, layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A:
        return f"{len(names)} adapters"
    (name,) = names
    if name in layer.lora_variant:
        return "DoRA"
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not isinstance(dropout, nn.Identity):
        return "dropout"
    if type(base) is not nn.Linear or b.bias is not None:
        return "another kind of layer"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "a trained base"
    # ZeRO-3 gathers a weight when its own module is called, and this is already known before it adds its hooks
    if hasattr(base.weight, "ds_shape") or any(map(has_hooks, (base, a, b, dropout))):
        return "hooks of single modules"
    return ""


def described(model: nn.Module) -> str:
    """Returns how the adapters of a model are computed, for people, "" where it has none."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    reasons = Counter(map(hindrance, layers))
    if not layers:
        return ""
    words = [f"fused in {reasons.pop('', 0)} of {len(layers)} layers"]
    return ", ".join(words + [f"peft's own path in {n} ({reason})" for reason, n in reasons.items()])
