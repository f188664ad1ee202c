"""The norms and gated MLPs of llama's kind as one autograd function each, which keep less for the backward pass.

transformers writes both step by step, and autograd keeps what each step reads: of a norm a float32 copy of its
input, of a gated MLP the activated gate beside gate and up. Here a norm keeps its input, an MLP gate and up, and
the rest is made again in backward.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mft.model.introspect import full_shape
from mft.model.torch_private import has_hooks, silu_gradient


class RootMeanSquare(torch.autograd.Function):
    """x [..., H], w [H], eps → w * (x / sqrt(mean(x * x) + eps)) in x's dtype [..., H]; statistics are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_H: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, w_H)
        return w_H * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, w_H = ctx.saved_tensors
        normed = x.to(torch.float32) * scale
        dx = dw_H = None
        if ctx.needs_input_grad[1]:
            dw_H = (dy * normed.to(x.dtype)).reshape(-1, len(w_H)).sum(0).to(w_H.dtype)
        if ctx.needs_input_grad[0]:
            d_normed = (dy * w_H).to(torch.float32)
            along = (d_normed * normed).mean(-1, keepdim=True)
            dx = d_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)
        return dx, dw_H, None


class GatedSilu(torch.autograd.Function):
    """gate and up [..., I] → silu(gate) * up [..., I]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return silu_gradient(dy * up, gate), nn.functional.silu(gate).mul_(dy)


class FusedNorm:
    """A norm whose forward is NORM."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        y: Tensor = RootMeanSquare.apply(hidden_states, self.weight, self.variance_epsilon)
        return y


class FusedMlp:
    """An MLP whose forward is MLP and whose activation is SiLU."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = GatedSilu.apply(gate, up) if gate.dtype == up.dtype else nn.functional.silu(gate) * up
        y: Tensor = self.down_proj(product)
        return y


NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""
"""The forward of llama's norm, which most families of transformers have word for word."""

MLP = """
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj
"""
"""The forward of llama's MLP, likewise."""


def fuse_layers(model: nn.Module) -> None:
    """Lets norms and gated MLPs be computed by one function each, where their class says word for word what the
    function computes."""
    for module in model.modules():
        fused = _fused_class(type(module))  # type: ignore[arg-type]  # a class is hashable
        if fused and not has_hooks(module) and _fits(module, fused):
            module.__class__ = fused


def described(model: nn.Module) -> str:
    """Returns which layers of a model are fused, for people, "" where none is."""
    modules = list(model.modules())
    norms, mlps = (sum(isinstance(m, kind) for m in modules) for kind in (FusedNorm, FusedMlp))
    return " and ".join(f"{n} {name}" for n, name in ((norms, "norms"), (mlps, "gated MLPs")) if n)


def spared(layer: nn.Module, size: int) -> int:
    """Returns the bytes of a token that the fused modules of a layer keep less than transformers' own.

    size: bytes of a number that is computed with.
    """
    found = 0
    for module in layer.modules():
        if isinstance(module, FusedMlp):
            found += size * int(getattr(module.down_proj, "in_features", 0))
        elif isinstance(module, FusedNorm):
            # a float32 copy of its input instead of the input, and what a trained weight multiplies
            found += full_shape(module.weight)[0] * ((4 - size) + size * module.weight.requires_grad)
    return found


def _fits(module: nn.Module, fused: type[nn.Module]) -> bool:
    return issubclass(fused, FusedNorm) or type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


@lru_cache(maxsize=1024)
def _fused_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns a class like `kind` with the fused forward, None where its forward is another one."""
    of_transformers = kind.__module__.startswith("transformers.") and "forward" in vars(kind)
    if not of_transformers or issubclass(kind, FusedNorm | FusedMlp):
        return None
    body = _body(kind.forward)
    for text, fused in ((NORM, FusedNorm), (MLP, FusedMlp)):
        if body == ast.unparse(ast.parse(text)):
            # the same name: layers are found by the names of their classes
            return type(kind.__name__, (fused, kind), {"__module__": kind.__module__})
    return None


def _body(function: Any) -> str:
    """Returns the statements of a function without its docstring, normalised."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        return ""
    statements = tree.body[1:] if ast.get_docstring(tree) else tree.body
    return "\n".join(map(ast.unparse, statements))
