"""Peak memory of a process, by phase of its run."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

PEAKS = ("peak_gib", "reserved_gib")
"""Names of the peaks where they are reported in GiB, in the order in which they are read."""


class Source(Protocol):
    """Where peaks are read."""

    resets: bool
    """Whether `reset` works, so that peaks are those of one phase."""

    def read(self) -> tuple[int, ...]:
        """Returns the peaks since the last reset, in bytes: of what was used and, where known, reserved."""

    def reset(self) -> None:
        """Lets the peaks begin anew from what is used now."""


class Resident:
    """The process on a CPU: the most of it that was in the machine's memory."""

    def __init__(self) -> None:
        self.resets = False
        self.reset()

    def read(self) -> tuple[int, ...]:
        if self.resets:
            return (resident("VmHWM"),)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,)

    def reset(self) -> None:
        # 10 microseconds; some containers refuse it, and then the peak is that of the process so far
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.resets = True


def resident(name: str) -> int:
    """Returns a number of /proc/self/status in bytes: VmRSS, the memory of this process now, or VmHWM, the
    most since it was reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="ignore")
    return int(status.partition(f"{name}:")[2].split(maxsplit=1)[0]) * 1024


class Cuda:
    """torch's allocator on a GPU."""

    resets = True

    def __init__(self, device: torch.device):
        self.device = device

    def read(self) -> tuple[int, ...]:
        import torch

        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def reset(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)


class PeakMemory:
    """The peaks of a process by phase of its run (`phases.Phase`)."""

    def __init__(self, source: Source):
        self.source = source
        self.by_phase: dict[str, tuple[int, ...]] = {}
        """Bytes used and, where known, reserved, at most."""
        self._unread: dict[str, tuple[int, ...]] = {}

    @classmethod
    def of(cls, device: torch.device | str) -> PeakMemory:
        """Returns the peaks of this process on its device."""
        import torch

        device = torch.device(device)
        return cls(Cuda(device) if device.type == "cuda" else Resident())

    def close(self, phase: str) -> None:
        """Ends a stretch of the run, which was of this phase."""
        peaks = self.source.read()
        for of in (self.by_phase, self._unread):
            of[phase] = larger(of.get(phase, ()), peaks)
        self.source.reset()

    def read(self, phase: str) -> tuple[int, ...]:
        """Returns the peaks of a phase, which this is, since the last read."""
        self.close(phase)
        return self._unread.pop(phase)


def larger(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the larger of each two peaks; () is none."""
    return tuple(map(max, one, other)) if one and other else one or other
