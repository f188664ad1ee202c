"""Makes the next step's micro-batches ready, in a thread, while the present step computes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mft.batch import StepBatches
from mft.training.trainer import StepSource

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prefetched:
    """The steps of a source, each read, collated, counted and sent to the device one step ahead.

    A step carries the place in the data after itself (`StepBatches`), so that a checkpoint knows nothing of
    the one that is ready. What the source raises is raised when its step is due.
    """

    source: StepSource
    device: torch.device

    def steps(self, epoch: int, rows_consumed: int, count: int) -> Generator[StepBatches]:
        """See `StepSource`. The thread ends with the last step, or when this is closed."""
        coming = self.source.steps(epoch, rows_consumed, count)
        with closing(coming), ThreadPoolExecutor(1, "prefetch", _same_device(self.device)) as thread:
            ready = thread.submit(self._next, coming)
            while (data := ready.result()) is not None:
                ready = thread.submit(self._next, coming)
                yield data

    def _next(self, coming: Generator[StepBatches]) -> StepBatches | None:
        if (data := next(coming, None)) is None:
            return None
        # in the stream of the main thread: the copies are done before the kernels that read them
        return replace(data, batches=[batch.to(self.device) for batch in data.batches])


def _same_device(device: torch.device) -> Callable[[], None] | None:
    """Returns what gives another thread the CUDA device of this one; a thread begins with the first GPU."""
    import torch

    if device.type != "cuda":
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())
