"""The fastest attention of a packed row on its device and in its dtype: one kernel for all samples on a GPU,
blocks of matrix products on a CPU, else torch's sdpa sample by sample.

`model.attention=auto` takes it; `model.attention=sdpa` stays with sdpa, to compare.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from mft.hardware import AMPERE, cpu_computes_in_bf16
from mft.model import cpu_attention
from mft.model.packed_row import PackedRow, per_sample
from mft.model.torch_private import Varlen, varlen

WIDEST = 256
"""Head width up to which torch's varlen attention works, in multiples of 8."""

VARLEN, BLOCKS, SDPA = "varlen", "blocks", "sdpa"


class Machine(NamedTuple):
    """What decides on the kernel beside the call itself."""

    device: str
    """Kind of the device: cuda, cpu, …"""

    capability: tuple[int, int] = (0, 0)
    """Compute capability of an NVIDIA GPU, (0, 0) for any other device."""

    varlen: Varlen | None = None
    """torch's varlen attention, None where torch has none."""

    native_bf16: bool = False
    """Whether a CPU multiplies in bf16."""


_stands_for: ContextVar[Machine | None] = ContextVar("stands_for", default=None)


@contextmanager
def standing_for(other: Machine | None) -> Iterator[None]:
    """Context in which attention is that of another machine, None = this one; fake tensors alone can tell."""
    token = _stands_for.set(other)
    try:
        yield
    finally:
        _stands_for.reset(token)


def machine(device: torch.device) -> Machine:
    """Returns what decides on the kernel for tensors of a device."""
    return _stands_for.get() or _this_machine(device)


@functools.cache
def _this_machine(device: torch.device) -> Machine:
    if device.type != "cuda" or torch.version.cuda is None:
        return Machine(device.type, native_bf16=device.type == "cpu" and cpu_computes_in_bf16())
    return Machine("cuda", torch.cuda.get_device_capability(device), varlen())


def kernel(
    machine: Machine,
    dtype: torch.dtype,
    widths: tuple[int, int],
    longest: int = 2,
    window: int | None = None,
) -> str:
    """Returns VARLEN, BLOCKS or SDPA for plain causal attention of a packed row.

    dtype: what is computed in; widths: of a head's keys and of its values; longest: tokens of the longest
    sample, any above 1 to describe a run; window: number of keys a query sees, None = all before it.
    """
    windowed = window is not None and 0 < window < longest
    if machine.device == "cpu":
        fast = machine.native_bf16 and dtype == torch.bfloat16 and longest <= cpu_attention.LONGEST
        return BLOCKS if fast and not windowed else SDPA
    half = dtype in (torch.bfloat16, torch.float16)
    fits = 0 < widths[0] == widths[1] <= WIDEST and widths[0] % 8 == 0
    if machine.varlen is None or machine.capability < AMPERE or not half or not fits:
        return SDPA
    # Of one query a sample flash-attn makes a batch of decoding steps; for heads this wide its backward pass
    # exists on data-center GPUs alone.
    if longest == 1 or (widths[0] > 192 and machine.capability not in ((8, 0), (9, 0), (10, 0))):
        return SDPA
    return VARLEN if machine.varlen.windows or not windowed else SDPA


def described(device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> str:
    """Returns what computes attention in heads of these widths (keys, values; 0 = unknown), for people."""
    words = {
        VARLEN: "torch's varlen_attn, all samples of a row at once",
        BLOCKS: f"blocks of matrix products, sample by sample (sdpa above {cpu_attention.LONGEST} tokens)",
        SDPA: "sdpa, sample by sample",
    }
    return words[kernel(machine(device), dtype, widths)]


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which sdpa computes on a tensor: autocast's, where that is on."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def is_plain(module: Any, arguments: dict[str, Any]) -> bool:
    """Whether a call of attention asks for nothing beside causal attention, in a window or not: no dropout,
    soft cap, sinks, biases or scores to return."""
    causal = arguments.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal) or arguments.get("dropout"):
        return False
    extras = ("softcap", "s_aux", "position_bias", "cache", "output_attentions")
    return all(arguments.get(name) is None or arguments[name] is False for name in extras)


def repeats_keys(device: str, dtype: torch.dtype, heads: int, key_heads: int) -> bool:
    """Whether sdpa is to be given the keys and values of fewer heads once for each query head.

    On CUDA only its flash kernel takes fewer of them, and that has no float32: without this the math kernel
    keeps queries x keys probabilities of every layer, where the memory-efficient kernel keeps none.
    """
    return device == "cuda" and dtype == torch.float32 and heads != key_heads


def sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, Any]:
    """transformers' attention by torch's sdpa, kept off the math kernel."""
    heads, key_heads = query.shape[1], key.shape[1]
    if repeats_keys(machine(query.device).device, computing_dtype(query), heads, key_heads):
        key, value = (repeat_kv(tensor, heads // key_heads) for tensor in (key, value))
        # A module without num_key_value_groups, by which transformers would repeat them again.
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(module, query, key, value, mask, **arguments)


sdpa_by_sample = per_sample(sdpa)


def fastest(
    module: Any,
    query: Tensor,  # [B, heads, T, head width]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_row: PackedRow | None = None,
    **arguments: Any,
) -> tuple[Tensor, Any]:
    """sdpa, and within the samples of a `packed_row` the fastest equal of it."""
    if packed_row is not None and is_plain(module, arguments):
        row, dtype = packed_row.as_seen_by(module), computing_dtype(query)
        window, scale = arguments.get("sliding_window"), arguments.get("scaling")
        here = machine(query.device)
        chosen = kernel(here, dtype, (query.shape[-1], value.shape[-1]), row.longest, window)
        if chosen != SDPA:
            # Neither has a rule of autocast, and rotary positions leave queries and keys in float32.
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if chosen == BLOCKS:
            return cpu_attention.causal_attention(query, key, value, row.lengths, scale), None
        if chosen == VARLEN and here.varlen is not None:
            q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
            return here.varlen(q, k, v, row.cu_seqlens, row.longest, window, scale)[None], None
    return sdpa_by_sample(module, query, key, value, attention_mask, packed_row=packed_row, **arguments)
