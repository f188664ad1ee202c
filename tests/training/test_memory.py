"""Peaks of memory. No GPU is here: a list of what an allocator would count stands for it."""

from __future__ import annotations

import pytest

from mft.training.memory import Cuda, PeakMemory, Resident

GIB = 2**30


class Counted:
    """What is allocated and reserved, with their peaks since the last reset."""

    def __init__(self) -> None:
        self.now, self.peak, self.reserved = 0, 0, 0

    def use(self, gib: int) -> None:
        """Takes so many GiB for a moment."""
        self.peak = max(self.peak, self.now + gib * GIB)
        self.reserved = max(self.reserved, self.peak)

    def read(self) -> tuple[int, ...]:
        return self.peak, self.reserved

    def reset(self) -> None:
        self.peak = self.now  # what is reserved stays reserved


def test_the_peak_of_a_row_is_that_of_its_steps() -> None:
    source = Counted()
    memory = PeakMemory(source)
    source.use(60)  # loading
    memory.close(training=False)
    source.use(20)
    memory.close(training=True)
    source.use(40)  # a validation between two steps
    memory.close(training=False)
    source.use(30)
    assert memory.read_steps() == {"memory/peak_gib": 30.0, "memory/reserved_gib": 60.0}
    source.use(10)
    assert memory.read_steps()["memory/peak_gib"] == 10.0
    assert memory.overall_gib() == 60.0


def test_on_a_cpu_it_is_the_process() -> None:
    memory = PeakMemory.of("cpu")
    assert isinstance(memory.source, Resident)
    row = memory.read_steps()
    assert set(row) == {"memory/peak_gib"}
    assert row["memory/peak_gib"] == pytest.approx(memory.overall_gib(), rel=0.2)
    assert isinstance(PeakMemory.of("cuda:0").source, Cuda)
