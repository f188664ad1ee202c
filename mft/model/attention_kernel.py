"""Chooses the attention implementation: whether flash attention 2 can run, by machine, dtype and model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mft.errors import UserError
from mft.hardware import visible_gpus
from mft.model.transformers_private import flash_kernels

FLASH = "flash_attention_2"
OLDEST = (2, 6)
"""Version of flash-attn that came with soft caps: transformers silently leaves them out under an
older one."""

AMPERE = (8, 0)
"""Compute capability that its kernels need."""

HALF = ("bfloat16", "float16", "bf16", "fp16")


class Attention(StrEnum):
    """Values of model.attention; auto = flash_attention_2 where it can run, else sdpa."""

    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


@dataclass(frozen=True)
class Facts:
    """What flash attention finds on a machine."""

    version: tuple[int, int] | None
    """Of the package flash-attn, None without it."""

    gpus: int = 0
    """Number of CUDA GPUs."""

    capability: tuple[int, int] = (0, 0)
    """The lowest compute capability among them."""

    @classmethod
    def here(cls) -> Facts:
        """Returns those of this machine; torch is imported only where package and GPU are there."""
        try:
            major, minor = importlib.metadata.version("flash-attn").split(".")[:2]
        except importlib.metadata.PackageNotFoundError:
            return cls(None)
        version, gpus = (int(major), int(minor)), visible_gpus()
        if not gpus:
            return cls(version)
        import torch

        if torch.version.cuda is None:  # an AMD GPU
            return cls(version)
        return cls(version, gpus, min(torch.cuda.get_device_capability(i) for i in range(gpus)))


def unavailable_reason(facts: Facts, dtype: str = HALF[0]) -> str:
    """Returns why flash attention cannot run on a machine in a computing dtype, e.g. torch.bfloat16 or bf16;
    "" if it can."""
    if facts.version is None:
        return "the package flash-attn is not installed"
    if facts.version < OLDEST:
        return f"flash-attn is of version {_dotted(facts.version)}; {_dotted(OLDEST)} or newer is needed"
    if not facts.gpus:
        return "there is no CUDA device"
    if facts.capability < AMPERE:
        return f"the GPU has compute capability {_dotted(facts.capability)}; {_dotted(AMPERE)} or higher is needed"
    if dtype.removeprefix("torch.") not in HALF:
        return f"it has no kernel for {dtype.removeprefix('torch.')}; train in bf16 or fp16"
    return ""


def unsupported_reason(model_class: Any) -> str:
    """Returns why a class of models cannot use flash attention 2, "" if it can."""
    supported, only = flash_kernels(model_class)
    if not supported:
        return f"{model_class.__name__} does not support it"
    if only and FLASH not in only:  # gpt-oss: its sinks are in other kernels alone
        return f"{model_class.__name__} adds to its attention what it does not compute"
    return ""


def refuse_flash(attention: str, dtype: str = HALF[0]) -> None:
    """Raises UserError where flash attention is asked for and this machine cannot run it in that dtype."""
    if attention == FLASH and (why := unavailable_reason(Facts.here(), dtype)):
        raise _refusal(why)


def choose_kernel(attention: str, dtype: str, model_class: Callable[[], Any]) -> str:
    """Returns the implementation to load a model with, auto resolved.

    model_class: gives its class, None where it comes with code of its own, of which auto expects nothing.
    Raises UserError where flash attention is asked for and cannot run.
    """
    if attention not in ("auto", FLASH):
        return str(Attention(attention).value)
    why = unavailable_reason(Facts.here(), dtype)
    if not why:
        cls = model_class()
        why = unsupported_reason(cls) if cls else "" if attention == FLASH else "unknown"
    if why and attention == FLASH:
        raise _refusal(why)
    return "sdpa" if why else FLASH


def _refusal(why: str) -> UserError:
    return UserError(f"model.attention={FLASH} cannot run here: {why}; use model.attention=auto or sdpa")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
