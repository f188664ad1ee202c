"""Peak memory of a run: of its training steps, and of all it did."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

NAMES = ("memory/peak_gib", "memory/reserved_gib")
"""Metrics, in the order of what a source reads."""


class Source(Protocol):
    """Where peaks are read."""

    def read(self) -> tuple[int, ...]:
        """Returns the peaks since the last reset, in bytes: of what was used and, where known, reserved."""

    def reset(self) -> None:
        """Lets the peaks begin anew from what is used now."""


class Resident:
    """The process on a CPU. The system's peak of its memory cannot be reset: it is that of the process."""

    def read(self) -> tuple[int, ...]:
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,)

    def reset(self) -> None:
        pass


class Cuda:
    """torch's allocator on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def read(self) -> tuple[int, ...]:
        import torch

        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def reset(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)


class PeakMemory:
    """The peaks of a process, with those of its training steps apart from loading, validating and saving."""

    def __init__(self, source: Source):
        self.source = source
        self._steps: tuple[int, ...] = ()
        self._overall: tuple[int, ...] = ()

    @classmethod
    def of(cls, device: torch.device | str) -> PeakMemory:
        """Returns the peaks of this process on its device."""
        import torch

        device = torch.device(device)
        return cls(Cuda(device) if device.type == "cuda" else Resident())

    def close(self, training: bool) -> None:
        """Ends a stretch of the run, which was of training steps or not."""
        peaks = self.source.read()
        self._overall = _larger(self._overall, peaks)
        if training:
            self._steps = _larger(self._steps, peaks)
        self.source.reset()

    def read_steps(self) -> dict[str, float]:
        """Returns the peaks of the training steps since the last read, in GiB, by metric."""
        self.close(training=True)
        steps, self._steps = self._steps, ()
        return {name: peak / 2**30 for name, peak in zip(NAMES, steps, strict=False)}

    def overall_gib(self) -> float:
        """Returns the largest memory that the process has used so far, in GiB."""
        self.close(training=False)
        return self._overall[0] / 2**30


def _larger(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(max, one, other)) if one else other
