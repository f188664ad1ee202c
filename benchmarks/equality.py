"""Two ranks of every backend against one process at the same global batch: the largest differences, as a table.

    python -m benchmarks.equality

ddp, zero2, zero3 and fsdp × full, LoRA, QLoRA × padded, packed rows, 20 steps of the tiny model in fp32 on the CPU with
gloo. In each cell, over all steps: the largest absolute difference of the objective, of the validation loss (both nats
per token), of the gradient norm before clipping (to 0.5), and of a final parameter. The tests bound each by 1e-5.
"""

from __future__ import annotations

import tempfile
from pathlib import Path


def main() -> None:
    """Prints the table of docs/distribution.md."""
    from tests.dist.equality import MATRIX, differences, play_beside_single
    from tests.dist.runs import BACKENDS, Tree

    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder))
        play_beside_single(tree, MATRIX)
        print("| peft, rows | " + " | ".join(BACKENDS) + " |\n" + "|--" * (1 + len(BACKENDS)) + "|")
        for case in MATRIX:
            cells = []
            for backend in BACKENDS:
                found = differences(tree.folder("single", case), tree.folder(backend, case))
                cells.append(" · ".join(f"{value:.0e}" for value in found.values()))
            print(f"| {case.replace('-', ', ')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
