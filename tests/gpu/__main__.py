"""Plays the cells that compare a GPU with a CPU, a backend with a single process, a kernel with another."""

from __future__ import annotations

import sys

from mft.hardware import growing_segments

if __name__ == "__main__":
    growing_segments()  # as in a rank, before torch is imported
    from tests.gpu.cells import CELLS
    from tests.gpu.children import main

    sys.exit(main(CELLS, __doc__, minutes=10))
