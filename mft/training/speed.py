"""Tokens per second, and how much of its peak a device computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mft.cards import known

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Peak:
    """What MFU and HFU are shares of."""

    tflops: float
    """Of one device; 0: not known."""
    source: str
    """Where it is from, or why it is not known."""

    @classmethod
    def of(cls, device: torch.device | str, given: float | None = None) -> Peak:
        """Returns the peak of this rank's device. given: train.peak_tflops."""
        import torch

        if given is not None:
            return cls(given, "train.peak_tflops")
        if torch.device(device).type != "cuda":
            return cls(0.0, "unknown peak of a CPU: set train.peak_tflops")
        name = torch.cuda.get_device_name(device)
        if not (found := known(name, any_size=True)):
            return cls(0.0, f"unknown peak of {name}: set train.peak_tflops")
        shown, card = found
        return cls(card.tflops, f"{shown}, {'bf16' if card.bf16 else 'fp16'}, dense, by its data sheet")


@dataclass(frozen=True)
class Work:
    """The matrix work of training (`mft.model.flops`), and the peak of the devices that do it."""

    model: float
    """FLOPs of a token in a step."""
    recomputed: float
    """What gradient checkpointing adds to it."""
    peak: Peak

    def utilization(self, tokens: float, device_seconds: float) -> dict[str, float]:
        """Returns `mfu` and `hfu`, the share of the peak that was model work, and all work; {} where it is
        not known. tokens: without padding; device_seconds: of all devices together."""
        if not (self.peak.tflops and self.model):
            return {}
        shares = tokens / (device_seconds * self.peak.tflops * 1e12)
        return {"mfu": shares * self.model, "hfu": shares * (self.model + self.recomputed)}


def rates(tokens: float, positions: float, trained: float, seconds: float) -> dict[str, float]:
    """Returns tokens per second by name: without padding, with it, and those that carry loss."""
    counts = {"tokens": tokens, "all_tokens": positions, "trained_tokens": trained}
    return {f"{name}_per_second": count / seconds for name, count in counts.items()}
