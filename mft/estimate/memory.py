"""What of a device's memory is counted on, and the sizes of a model and of an optimizer's states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mft.model.peft.summary import AuditRow, total_of

if TYPE_CHECKING:
    from torch import nn

CONTEXT = 2**30
"""Bytes of a GPU's memory that CUDA itself takes."""

USABLE = 0.9
"""Share of a GPU's memory that is counted on; the rest is for fragments and for exchanges between ranks."""


@dataclass(frozen=True)
class Sizes:
    """Of a model with what is trained in it."""

    trained: int
    """Weights that are trained."""
    frozen_bytes: int
    """What all others take in memory."""

    @classmethod
    def of(cls, model: nn.Module, rows: Sequence[AuditRow]) -> Sizes:
        """model: on the meta device; rows: its audit."""
        trained = total_of(rows, "trainable")
        of_trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return cls(trained, total_of(rows, "bytes") - of_trained)


def optimizer_bytes(optimizer: Any, lr: float) -> float:
    """Returns the bytes that an optimizer keeps for a trained weight.

    Measured by a step of a small matrix on the CPU (AdamW, 8-bit AdamW, Adafactor, Adagrad, SGD: 0.1 to 3 ms).
    """
    import torch

    weight = torch.nn.Parameter(torch.zeros(128, 128))
    live = optimizer.build([("weight", weight)], lr)
    weight.grad = torch.zeros_like(weight)
    live.step()
    states = [value for value in live.state[weight].values() if torch.is_tensor(value) and value.dim()]
    return sum(state.nbytes for state in states) / weight.numel()


def size_words(size: float) -> str:
    """Returns bytes in words: 12.3 GiB, 45 MiB."""
    mib = size / 2**20
    if mib >= 1023.5:
        return f"{mib / 1024:,.1f} GiB"
    return f"{mib:.0f} MiB" if mib >= 100 else f"{mib:.3g} MiB"
