"""Plays the cells that compare a GPU with a CPU, a backend with a single process, a kernel with another."""

from __future__ import annotations

import sys

from tests.gpu.cells import CELLS
from tests.gpu.children import main

if __name__ == "__main__":
    sys.exit(main(CELLS, __doc__, minutes=10))
