"""Makes the next step's micro-batches ready, in a thread, while the present step computes."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from threading import Thread
from typing import TYPE_CHECKING

from mft.batch import StepBatches
from mft.training.trainer import StepSource

if TYPE_CHECKING:
    import torch

PATIENCE = 5
"""Seconds that the end of a run waits for a step that is still being made."""


@dataclass(frozen=True)
class Prefetched:
    """The steps of a source, each read, collated, counted and sent to the device one step ahead.

    A step carries the place in the data after itself (`StepBatches`), so that a checkpoint knows nothing of
    the one that is ready. What the source raises is raised when its step is due.
    """

    source: StepSource
    device: torch.device

    def steps(self, epoch: int, rows_consumed: int, count: int) -> Generator[StepBatches]:
        """See `StepSource`. The source is closed with the last step, or when this is closed."""
        coming = self.source.steps(epoch, rows_consumed, count)
        ready = self._made_ahead(coming)
        try:
            while (data := ready.result()) is not None:
                ready = self._made_ahead(coming)
                yield data
        finally:
            # A read that hangs must not keep the error from being reported that ended the run.
            ready.add_done_callback(lambda _: coming.close())
            wait([ready], timeout=PATIENCE)

    def _made_ahead(self, coming: Generator[StepBatches]) -> Future[StepBatches | None]:
        """Makes the next step, None after the last one, in a thread that no exit of Python waits for."""
        import torch

        made: Future[StepBatches | None] = Future()
        # a thread begins with the first GPU
        gpu = torch.cuda.current_device() if self.device.type == "cuda" else None

        def make() -> None:
            try:
                if gpu is not None:
                    torch.cuda.set_device(gpu)
                made.set_result(self._on_device(next(coming, None)))
            except BaseException as error:  # raised by result()
                made.set_exception(error)

        Thread(target=make, name="prefetch", daemon=True).start()
        return made

    def _on_device(self, data: StepBatches | None) -> StepBatches | None:
        if data is None:
            return None
        # in the stream of the main thread: the copies are done before the kernels that read them
        return replace(data, batches=[batch.to(self.device) for batch in data.batches])
