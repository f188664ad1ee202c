"""How long a rank was in each phase of its run and how much memory it took there, over all parts of a run.

A resumed run goes on with what its checkpoint holds: what a kill undid, the writing of that checkpoint and
what came after it are left out.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from mft.batch import StepBatches
from mft.training.memory import PeakMemory, Resident, larger

if TYPE_CHECKING:
    import torch

    from mft.distributed.engine import Engine


class Phase(StrEnum):
    """What a run does. Each moment is of one phase."""

    data = "data"
    """Reading and tokenising rows, and starting the ranks."""
    loading = "loading"
    """The model, the checkpoint of a resumed run, and what is made of them; opening the trackers."""
    training = "training"
    """Steps, logging included."""
    validation = "validation"
    """Validations and the test."""
    saving = "saving"
    """Checkpoints, final/ and the profile."""
    answers = "answers"
    """To train.prompts."""
    closing = "closing"
    """The pictures, and what lies between the phases above once training has begun; writing the summary, and
    sending to trackers after it, are left out."""


class Phases:
    """The clock and the peaks of one rank. It begins with the process's part of the run."""

    def __init__(self, phase: Phase = Phase.data, device: torch.device | None = None):
        """device: whose peaks are read; None: not known yet, see `measure`."""
        self.phase = phase
        self.waited = 0.0
        """Seconds for which training waited for the batches of its next step."""
        self.memory = PeakMemory(Resident())
        self.memory.source.reset()
        self._seconds = dict.fromkeys(Phase, 0.0)
        self._began = self._started = time.perf_counter()
        # of the earlier parts of the run
        self._seconds_before = self._device_seconds_before = self._training_before = 0.0
        if device is not None:
            self.measure(device)

    def measure(self, device: torch.device) -> None:
        """Reads the peaks of a GPU from now on, where the device is one; before anything is allocated there."""
        if device.type == "cuda":
            self.memory = PeakMemory.of(device)

    def enter(self, phase: Phase) -> None:
        """Begins a phase, which ends the present one."""
        now = time.perf_counter()
        self._seconds[self.phase] += now - self._began
        self.memory.close(self.phase)
        self.phase, self._began = phase, now

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Context of a phase, after which the present one goes on."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def awaited(self, steps: Generator[StepBatches]) -> Generator[StepBatches]:
        """Yields the steps, and counts how long each of them was waited for."""
        while True:
            began = time.perf_counter()
            data = next(steps, None)
            self.waited += time.perf_counter() - began
            if data is None:
                return
            yield data

    def seconds(self, phase: Phase) -> float:
        """Returns the seconds of a phase so far."""
        return self._seconds[phase] + (phase is self.phase) * (time.perf_counter() - self._began)

    def total(self) -> float:
        """Returns the seconds of the run so far."""
        return self._seconds_before + time.perf_counter() - self._started

    def state(self, engine: Engine) -> list[dict[str, Any]]:
        """Returns plain values of every rank from which `resume` goes on. All ranks call it.

        Each has seconds by phase, peaks in bytes by phase, `waited`, and `device_seconds`: those of all
        devices in training, whatever their number was in earlier parts.
        """
        self.enter(self.phase)
        training = self._seconds[Phase.training] - self._training_before
        own = {
            "seconds": {phase: seconds for phase, seconds in self._seconds.items() if seconds},
            "peaks": {phase: list(peaks) for phase, peaks in self.memory.by_phase.items()},
            "resets": self.memory.source.resets,
            "waited": self.waited,
            "device_seconds": self._device_seconds_before + engine.world * training,
        }
        return engine.gather(own)

    def resume(self, saved: Sequence[dict[str, Any]], seconds: float, engine: Engine) -> None:
        """Goes on from what `state` returned before the checkpoint, and the seconds that the run had taken.

        On another number of ranks each takes the largest of all values.
        """
        parts = [saved[engine.rank]] if len(saved) == engine.world else saved
        for phase in Phase:
            self._seconds[phase] += max((part["seconds"].get(phase, 0.0) for part in parts), default=0.0)
        self.waited += max((part["waited"] for part in parts), default=0.0)
        kinds = len(self.memory.source.read())
        for phase, peaks in (item for part in parts for item in part["peaks"].items()):
            if len(peaks) == kinds:  # else of a part on a GPU, and this is a CPU, or the reverse
                self.memory.by_phase[phase] = larger(self.memory.by_phase.get(phase, ()), tuple(peaks))
        self._seconds_before, self._training_before = seconds, self._seconds[Phase.training]
        self._device_seconds_before = saved[0]["device_seconds"] if saved else 0.0
