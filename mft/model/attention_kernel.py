"""Chooses the attention implementation: whether flash attention 2 can run, by machine, dtype and model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from mft.errors import UserError
from mft.hardware import AMPERE, gpus
from mft.model.transformers_private import flash_kernels

FLASH = "flash_attention_2"
OLDEST = (2, 6)
"""Version of flash-attn that came with soft caps: transformers silently leaves them out under an older one,
and its own `is_flash_attn_2_available` is content with 2.3.3."""

HALF = ("bfloat16", "float16", "bf16", "fp16")


class Attention(StrEnum):
    """Values of model.attention; auto = flash_attention_2 where it can run, else sdpa or what equals it and
    is faster in packed rows (see `fast_attention`)."""

    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class Facts(NamedTuple):
    """What decides whether flash attention can run on a machine."""

    version: tuple[int, int] | None
    """Of the package flash-attn, None without it."""

    gpus: int = 0
    """Number of CUDA GPUs."""

    capability: tuple[int, int] = (0, 0)
    """The lowest compute capability among them."""

    @classmethod
    def here(cls) -> Facts:
        """Returns those of this machine."""
        try:
            major, minor = importlib.metadata.version("flash-attn").split(".")[:2]
        except importlib.metadata.PackageNotFoundError:
            return cls(None)
        version, found = (int(major), int(minor)), gpus()
        lowest = min(found).capability if found else (0, 0)
        return cls(version, len(found) if any(lowest) else 0, lowest)  # (0, 0): an AMD GPU


def unavailable_reason(facts: Facts, dtype: str = HALF[0]) -> str:
    """Returns why flash attention cannot run on a machine in a computing dtype, e.g. torch.bfloat16 or bf16;
    "" if it can."""
    dotted = "{}.{}".format
    dtype = dtype.removeprefix("torch.")
    if facts.version is None:
        return "the package flash-attn is not installed"
    if facts.version < OLDEST:
        return f"flash-attn is of version {dotted(*facts.version)}; {dotted(*OLDEST)} or newer is needed"
    if not facts.gpus:
        return "there is no CUDA device"
    if facts.capability < AMPERE:
        found = dotted(*facts.capability)
        return f"the GPU has compute capability {found}; {dotted(*AMPERE)} or higher is needed"
    return "" if dtype in HALF else f"it has no kernel for {dtype}; train in bf16 or fp16"


def refuse_flash(attention: str, dtype: str = HALF[0], why: str = "") -> None:
    """Raises UserError where flash attention is set and this machine cannot run it in that dtype.

    why: a reason that is known already.
    """
    if attention == FLASH and (why := why or unavailable_reason(Facts.here(), dtype)):
        raise UserError(f"model.attention={FLASH} cannot run here: {why}; use model.attention=auto or sdpa")


def choose_kernel(attention: str, dtype: str, model_class: Callable[[], type | None]) -> str:
    """Returns the implementation to load a model with, auto resolved.

    model_class: gives its class, None where the checkpoint ships its own code, of which auto expects nothing.
    Raises UserError where flash attention is set and cannot run.
    """
    if attention not in ("auto", FLASH):
        return str(attention)
    why = unavailable_reason(Facts.here(), dtype)
    if not why:
        # The class is looked up last: that reads the config, maybe from the hub.
        cls = model_class()
        if cls is None:
            return FLASH if attention == FLASH else "sdpa"
        supported, compatible = flash_kernels(cls)
        if not supported:
            why = f"{cls.__name__} does not support it"
        elif compatible and FLASH not in compatible:  # gpt-oss: its sinks are in other kernels alone
            why = f"{cls.__name__} adds to its attention what it does not compute"
    if not why:
        return FLASH
    refuse_flash(attention, dtype, why)
    return "sdpa"
