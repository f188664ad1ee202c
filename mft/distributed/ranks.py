"""What the ranks of a run tell each other."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

from mft.distributed import heartbeat
from mft.hardware import send

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

T = TypeVar("T")


class Ranks:
    """This rank among the others: who it is, sums, values of all, and waiting.

    Every rank makes the same calls in the same order.
    """

    def __init__(self, accelerator: Accelerator):
        import torch

        # accelerate numbers CPUs by rank ("cpu:1"), which compares unequal to where tensors really are
        on_cpu = accelerator.device.type == "cpu"
        self.device: torch.device = torch.device("cpu") if on_cpu else accelerator.device
        self.rank: int = accelerator.process_index
        self.local_rank: int = max(accelerator.local_process_index, 0)
        self.world: int = accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and the terminal."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all ranks, a new tensor of the same type on the CPU.

        The host waits for the device, once; with one rank and a tensor on the CPU it does not.
        """
        import torch

        if self.world == 1:
            return tensor.detach().to("cpu", copy=True)
        total = send(tensor.detach().clone(), self.device)
        torch.distributed.all_reduce(total)
        return total.cpu()

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, by rank (pickled: only between our own ranks)."""
        import torch

        values = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here, however long one of them works alone: in no collective.

        Raises `stalled.Stalled` when a rank gives no sign of life any more.
        """
        heartbeat.wait_for_all()

    def patient(self) -> AbstractContextManager[None]:
        """Context for work that takes ranks very different times: collectives wait as long as `barrier`.

        All ranks enter it; it ends with a `barrier`.
        """
        return heartbeat.patient()
