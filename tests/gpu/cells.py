"""All cells in the order in which a GPU's minutes are best spent: facts, traps, then what rarely fails."""

from __future__ import annotations

from tests.gpu import commands, layouts, machine, trained, waits
from tests.gpu.children import Cell

CELLS: list[Cell] = [
    *machine.CELLS,
    *trained.REFERENCES,
    *layouts.LAYOUTS,
    *layouts.KERNELS,
    *trained.BACKENDS,
    *trained.FP16,
    *waits.CELLS,
    *trained.ON_CPU,
    *trained.OFFLOADED,
    *trained.TOLD,
    *commands.ANSWERED,
    *commands.LINES,
    *commands.RESUMED,
]
