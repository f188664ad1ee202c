"""Steps of 7B, 1.2B and 135M models on one GPU: LoRA, QLoRA and full, all backends, against a plain loop.

    python -m benchmarks.gpu [--minutes 5] [--only B2 …] [--device cpu --tiny]

Each cell runs in its own process (tests/gpu/children.py) and prints a JSON line when it ends; a table follows.
A variant is 3 steps that warm up and 8 that are timed, by CUDA events on a GPU: median, fastest, slowest. Ratios
are of variants of one cell, so of one process on one card. docs/gpu.md has what is expected.
"""

from __future__ import annotations

import sys

from mft.hardware import growing_segments

if __name__ == "__main__":
    growing_segments()  # as in a rank, before torch is imported
    from benchmarks.gpu.cells import CELLS
    from benchmarks.gpu.timing import table
    from tests.gpu.children import main

    sys.exit(main(CELLS, __doc__, minutes=5, report=table))
