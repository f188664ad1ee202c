"""What the card itself can do: matrix products, copies, attention. The rest is divided by these."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.models import lengths
from benchmarks.gpu.timing import measured
from mft.model.torch_private import varlen
from tests.gpu.children import Found, Place

PRODUCTS = {
    "4096 x 4096 x 4096": (4096, 4096, 4096),
    "4096 x 4096 x 11008": (4096, 4096, 11_008),
    "2048 x 2048 x 128256": (2048, 2048, 128_256),
    "261 x 2048 x 128256": (261, 2048, 128_256),
}
"""Rows, inner width and columns of a matrix product."""


def roofline(place: Place) -> Found:
    """Rates of single kernels in bf16."""
    device, scale = torch.device(place.device), 32 if place.small else 1
    found: dict[str, Any] = {}
    for name, sizes in PRODUCTS.items():
        m, k, n = (max(8, size // scale) for size in sizes)
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=device, dtype=torch.bfloat16).T
        found[f"product {name}"] = measured(place, lambda a=a, b=b: a @ b, 2.0 * m * k * n)
    source = torch.empty(2**30 // scale**2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = measured(place, lambda: target.copy_(source), 2.0 * source.numel())
    return Found(found | attention(device, place))


def attention(device: torch.device, place: Place) -> dict[str, Any]:
    """Forward and backward of 32 heads of 128 over one row of 4,096 tokens: as one sample, as 14 by sdpa one
    after the other, and as 14 by one call of varlen attention."""
    heads, width, total = (4, 32, 128) if place.small else (32, 128, 4096)
    shape = (1, heads, total, width)
    q, k, v, out = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    samples = lengths("P", total, 0)

    def one() -> torch.Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=True)

    def each() -> torch.Tensor:
        parts = zip(*(tensor.split(samples, dim=2) for tensor in inputs), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=2)

    calls = {"sdpa, one sample": one, "sdpa, 14 samples": each}
    if device.type == "cuda" and (kernel := varlen()):
        borders = torch.tensor([0, *samples], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)

        def at_once() -> torch.Tensor:
            rows = (tensor[0].transpose(0, 1) for tensor in inputs)
            return kernel(*rows, borders, max(samples)).transpose(0, 1)[None]

        calls["varlen, 14 samples"] = at_once
    found = {}
    for name, call in calls.items():
        # of the lower triangle: 2 products forward; backward 5, so 3.5 times as many in all
        flops = 3.5 * 2.0 * heads * width * sum(n * n for n in ([total] if call is one else samples))
        found[name] = measured(place, lambda call=call: torch.autograd.grad(call(), inputs, out), flops)
    return found
