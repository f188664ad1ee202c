"""The memory that a rank may use of its device, and the peak of what it has used: measured on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mft.errors import UserError
from mft.estimate.memory import USABLE
from mft.hardware import control_group
from mft.training.memory import Resident, resident

if TYPE_CHECKING:
    import torch

OF_A_HOST = 0.5
"""Share of a machine's free memory that training takes: the rest keeps the files of the data cached, and a
machine without memory swaps before it says that there is none."""


SIGNS = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",
    "out of memory",  # CUDA, where it is not raised as OutOfMemoryError
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Texts of a RuntimeError that mean memory."""


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, means that a device or the machine has no more memory."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS):
            return True
        error = error.__cause__
    return False


@dataclass
class Room:
    """Memory of one rank's device, in bytes."""

    limit: float
    """What a peak should not exceed."""
    whole: float
    """What a peak cannot exceed."""
    words: str
    """What the limit is, for people."""
    device: str
    """Which device it is, to recognise it."""

    def reset(self) -> None:
        """Lets the peak begin anew from what is used now."""
        raise NotImplementedError

    def used(self) -> float:
        """Returns what is used now."""
        raise NotImplementedError

    def peak(self) -> float:
        """Returns the most that was used since `reset`."""
        raise NotImplementedError


@dataclass
class Gpu(Room):
    """What torch's allocator may take of a GPU."""

    number: torch.device = field(kw_only=True)

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """Returns the room on a GPU, beside CUDA's context, NCCL and other processes there."""
        import torch

        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        name = f"{torch.cuda.get_device_name(device)}, {total / 2**30:.1f} GiB"
        words = f"{USABLE:.0%} of {name}, less what is not torch's"
        return cls(USABLE * total - others, total - others, words, name, number=device)

    def reset(self) -> None:
        import torch

        torch.cuda.empty_cache()  # what shorter rows have reserved in pieces
        torch.cuda.reset_peak_memory_stats(self.number)

    def used(self) -> float:
        import torch

        return torch.cuda.memory_allocated(self.number)

    def peak(self) -> float:
        import torch

        return torch.cuda.max_memory_allocated(self.number)


@dataclass
class Host(Room):
    """What this process may take of the machine's memory."""

    source: Resident = field(kw_only=True)

    @classmethod
    def of(cls, processes: int) -> Host:
        """Returns the room beside `processes - 1` others that train on this machine.

        Raises UserError where the system keeps no peak that could be reset.
        """
        import psutil

        if not (source := Resident()).resets:
            raise UserError(
                "train.per_device_batch_size=auto: the peak of this process cannot be measured here, since "
                "/proc/self/clear_refs may not be written. Allowed: a whole number from 1 on."
            )
        memory = psutil.virtual_memory()
        total, free = memory.total, memory.available
        allowed, used = control_group("memory.max"), control_group("memory.current")
        if allowed.isdigit() and used.isdigit() and int(allowed) < total:
            # of files that were read long ago, which the system drops first
            counts = dict(zip(*[iter(control_group("memory.stat").split())] * 2, strict=True))
            total = int(allowed)
            free = min(free, total - int(used) + int(counts.get("inactive_file", 0)))
        own, part = resident("VmRSS"), max(0, free) / processes
        words = f"{OF_A_HOST:.0%} of the machine's free memory"
        words += f", for {processes} processes" if processes > 1 else ""
        return cls(own + OF_A_HOST * part, own + part, words, f"CPU, {total / 2**30:.1f} GiB", source=source)

    def reset(self) -> None:
        self.source.reset()

    def used(self) -> float:
        return resident("VmRSS")

    def peak(self) -> float:
        return self.source.read()[0]
