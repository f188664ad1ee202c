"""What models use of torch beside its stable interface, as of 2.13.0.

A release that changes one of them fails in tests/model/test_torch_private.py, which says which.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

READ_IN = "2.13.0"
"""The version in which this was read."""


class Varlen:
    """torch's attention of many samples in one row, a prototype whose signature differs between releases.

    2.10: is_causal, but no window and no scale. 2.11: window_size and scale, but no word on fewer key heads.
    Since 2.12: enable_gqa.
    """

    def __init__(self, function: Callable[..., Any]):
        """function: varlen_attn of torch.nn.attention.varlen."""
        self.function = function
        names = inspect.signature(function).parameters
        self.windows = "window_size" in names
        self.scales = "scale" in names
        self.shares_keys = "enable_gqa" in names

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        window: int | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Returns causal attention within each sample, [T, heads, width].

        query, key, value: [T, heads, width] in half precision, key and value perhaps of fewer heads;
        cu_seqlens: int32 [N + 1] on their device; longest: tokens of the longest sample; window: number of
        keys a query sees, itself included; scale: of the scores, None = width ** -0.5.
        """
        groups = query.shape[1] // key.shape[1]
        arguments: dict[str, Any] = {}
        if groups > 1 and self.shares_keys:
            arguments["enable_gqa"] = True
        elif groups > 1:  # where nothing says that the kernel takes fewer key heads
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        usual = query.shape[-1] ** -0.5
        if self.scales:
            arguments["scale"] = usual if scale is None else scale
        elif scale not in (None, usual):
            query = query * (scale / usual)
        if self.windows:
            left = -1 if window is None or window >= longest else window - 1
            arguments["window_size"] = (left, 0)
        else:
            arguments["is_causal"] = True
        return self.function(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **arguments)


@functools.cache
def varlen() -> Varlen | None:
    """Returns torch's varlen attention, None where torch is older than 2.10."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    return Varlen(module.varlen_attn)


def softmax_gradient(gradient: Tensor, output: Tensor) -> Tensor:
    """Returns the gradient of a softmax over the last dimension, output * (gradient - sum(output *
    gradient)), in one pass and with float32 in between."""
    return torch._softmax_backward_data(gradient, output, -1, output.dtype)


def silu_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of silu(x), in one pass."""
    return torch.ops.aten.silu_backward(gradient, x)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to happen when this module itself is called: a hook, or another forward than its
    class's."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks)
    return any(hooks) or bool(module._backward_hooks) or "forward" in vars(module)
