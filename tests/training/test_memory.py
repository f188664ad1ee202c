"""Peaks of memory. No GPU is here: a list of what an allocator would count stands for it."""

from __future__ import annotations

import pytest

from mft.training.memory import Cuda, PeakMemory, Resident

GIB = 2**30


class Counted:
    """What is allocated and reserved, with their peaks since the last reset."""

    resets = True

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
    source.use(60)
    memory.close("loading")
    source.use(20)
    memory.close("training")
    source.use(40)  # between two steps
    memory.close("validation")
    source.use(30)
    assert memory.read("training") == (30 * GIB, 60 * GIB)
    source.use(10)
    assert memory.read("training")[0] == 10 * GIB
    peaks = {phase: used // GIB for phase, (used, _) in memory.by_phase.items()}
    assert peaks == {"loading": 60, "training": 30, "validation": 40}


def test_on_a_cpu_it_is_the_process() -> None:
    memory = PeakMemory.of("cpu")
    assert isinstance(memory.source, Resident)
    if not memory.source.resets:
        pytest.skip("/proc/self/clear_refs may not be written here")
    memory.close("loading")
    held = bytearray(64 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])  # each page is written to
    del held
    (large,) = memory.read("training")
    (small,) = memory.read("training")
    assert 60 << 20 < large - small < 100 << 20
    assert memory.by_phase["training"] == (large,)
    assert isinstance(PeakMemory.of("cuda:0").source, Cuda)
