"""A profile of a few steps (train.profile): what each operation took, written by torch's profiler.

Rank 0 records steps after the first ones, which are slower than all others, and none over a validation or a
checkpoint. The number of micro-batches is bounded, so that the trace is: 1 to 3 MB for each, and some
10 s to write it where a model does very many operations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.training.phases import Phase, Phases

if TYPE_CHECKING:
    import torch

FOLDER = "profile"
"""In the run folder."""

SKIPPED = 5
"""Steps of a process that are not recorded: memory is reserved in them, and kernels are chosen."""

STEPS, MICRO_BATCHES = 3, 4
"""Steps that are recorded, and their micro-batches, at most; of a longer step the last ones are."""

SEARCHED = 10_000
"""Steps among which a place without a validation and a checkpoint is looked for."""

OPERATIONS = 40
"""Rows of the table."""

HEAD = """\
Operations of steps {first} to {last} on rank 0, those first that took most time by themselves.

Self: without the operations that it calls; total: with them. ProfilerStep is a micro-batch (the last one of a
step with its update): its Self CPU is Python between the operations{waiting}.
{gpu}
Their order is in {trace}: open it at https://ui.perfetto.dev (Open trace file; it stays on your
machine) or at chrome://tracing. Python's threads, autograd's and the GPU's streams are rows of their own.

"""
"""What stands above the table."""

WAITING = ", and waiting for autograd's thread or the GPU"
"""What a thread also does beside operations where there is a GPU."""

GPU = """\
CUDA: time on the GPU, which computes while the CPU goes on. Where "Self CUDA" adds up to less than the steps
took, the GPU waited: for the CPU, for data or for other ranks (nccl).
"""


def window(done: int, total: int, accumulation: int, intervals: Sequence[int | None] = ()) -> range:
    """Returns the steps that are recorded, an empty range where the run is too short.

    done: steps before this process; total: of the run; accumulation: micro-batches of a step; intervals: of
    validations and checkpoints, null: never. They come after a step: only the last one recorded may have one.
    """
    first, longest = done + SKIPPED + 1, max(1, min(STEPS, MICRO_BATCHES // accumulation))
    often = [interval for interval in intervals if interval]
    for count in range(longest, 0, -1):
        for start in range(first, min(total - count + 1, first + SEARCHED) + 1):
            inner = range(start, start + count - 1)
            if not any(step % interval == 0 for step in inner for interval in often):
                return range(start, start + count)
    return range(0)


class StepProfile:
    """Records the steps of `choose`, and does nothing in all others."""

    def __init__(
        self,
        run_dir: Path | None = None,
        phases: Phases | None = None,
        device: torch.device | None = None,
        accumulation: int = 1,
        intervals: Sequence[int | None] = (),
        records: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ):
        """run_dir: None where none is wanted; phases: the clock of this rank; accumulation, intervals: see
        `window`; records: whether this rank does; barrier: where all of them meet."""
        self.run_dir, self.phases, self.device = run_dir, phases or Phases(), device
        self.accumulation, self.intervals = accumulation, intervals
        self.records, self.barrier = records, barrier
        self.steps = range(0)
        self.result: list[tuple[str, str]] = []
        """What there is to say about it at the end of the run: names and values."""
        self._first_micro_batch = max(1, accumulation - MICRO_BATCHES + 1)
        self._profiler: Any = None

    def choose(self, done: int, total: int) -> str:
        """Chooses the steps; returns why there are none, "" where there are or none are wanted."""
        if self.run_dir is None:
            return ""
        self.steps = window(done, total, self.accumulation, self.intervals)
        if self.steps:
            self.result = [("profile", f"none: the run ended before step {self.steps[-1]}")]
            return ""
        left = f"{total - done} steps are left" if done else f"the run has {total} steps"
        return f"train.profile=true has no effect: {left}, and the first {SKIPPED} are not recorded."

    def before(self, step: int, micro_batch: int) -> None:
        """Is called before each micro-batch of a step; both count from 1."""
        if not (self.steps and self.records):
            return
        if (step, micro_batch) == (self.steps[0] - 1, 1):
            self._start()  # a step early, since starting the profiler slows the operations after it
        elif step in self.steps and (step > self.steps[0] or micro_batch >= self._first_micro_batch):
            self._profiler.step()

    def after(self, step: int) -> None:
        """Is called when a step is done, before anything else is: writes what was recorded. All ranks call it."""
        if not self.steps or step != self.steps[-1]:
            return
        profiler, self._profiler = self._profiler, None
        with self.phases.during(Phase.saving):
            if profiler is not None:
                profiler.stop()
                self._write(profiler)
            self.barrier()  # or the others would wait in the time of their training

    def close(self) -> None:
        """Ends a profile whose last step did not come."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    @property
    def _on_gpu(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

    def _start(self) -> None:
        from torch.profiler import ProfilerAction, ProfilerActivity, profile

        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
            schedule=lambda number: ProfilerAction.RECORD if number else ProfilerAction.WARMUP,
        )
        self._profiler.start()

    def _write(self, profiler: Any) -> None:
        assert self.run_dir is not None
        first, last = self.steps[0], self.steps[-1]
        trace = self.run_dir / FOLDER / f"steps-{first}-{last}.trace.json.gz"
        table = trace.with_name(f"steps-{first}-{last}.txt")
        by = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        found = profiler.key_averages().table(sort_by=by, row_limit=OPERATIONS, max_name_column_width=60)
        waiting, gpu = (WAITING, GPU) if self._on_gpu else ("", "")
        head = HEAD.format(first=first, last=last, trace=trace.name, waiting=waiting, gpu=gpu)
        try:
            trace.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            table.write_text(head + found, encoding="utf-8")
        except OSError as error:  # a full disk: the run goes on
            for begun in (trace, table):
                with suppress(OSError):
                    begun.unlink(missing_ok=True)  # a part of it opens nowhere
            self.result = [("profile", f"not written: {error}")]
            return
        shown = [os.path.relpath(path) for path in (trace, table)]
        self.result = [
            ("profile", shown[0]),
            ("open it", "at https://ui.perfetto.dev or chrome://tracing"),
            ("its operations", shown[1]),
        ]
