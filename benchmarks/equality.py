"""Two ranks of every backend against one process at the same global batch: the largest differences, as a
table.

    python -m benchmarks.equality [bf16]

ddp, zero2, zero3 and fsdp × full, LoRA, QLoRA × padded, packed rows, 20 steps of the tiny model in fp32 on
the CPU with gloo. In each cell, over all steps: the largest absolute difference of the objective, of the
validation loss (both nats per token), of the gradient norm before clipping (to 0.5), and of a final
parameter. The tests bound each by 1e-5.

bf16: four steps of gradient descent in bf16, and the same with defects put in; the relative differences of
the objective, of the gradient norm, and of the whole update as one vector.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


def cell(found: Mapping[str, float]) -> str:
    """Returns differences as a cell of the table."""
    return " · ".join(f"{value:.0e}" for value in found.values())


def in_fp32(folder: Path) -> None:
    """Prints the table of docs/distribution.md."""
    from tests.distributed.equality import MATRIX, differences, play_beside_single
    from tests.distributed.runs import BACKENDS, Tree

    tree = Tree(folder)
    play_beside_single(tree, MATRIX)
    print("| peft, rows | " + " | ".join(BACKENDS) + " |\n" + "|--" * (1 + len(BACKENDS)) + "|")
    for case in MATRIX:
        cells = [
            cell(differences(tree.folder("single", case), tree.folder(backend, case))) for backend in BACKENDS
        ]
        print(f"| {case.replace('-', ', ')} | {' | '.join(cells)} |")


def in_bf16(folder: Path) -> None:
    """Prints a row for each backend, and one for each defect."""
    from tests.distributed.equality import play_beside_single, relative
    from tests.distributed.runs import BACKENDS, Tree
    from tests.distributed.test_descent import CASES, DEFECTS, STARTS, play_defects

    tree = Tree(folder)
    cases = {case: overrides for case, overrides in (CASES | STARTS).items() if "bf16" in case}
    play_beside_single(tree, cases, dict.fromkeys(("full-bf16", "lora-bf16"), BACKENDS))
    play_defects(tree)
    rows = [(backend, f"{peft}-bf16", "") for peft in ("full", "lora") for backend in BACKENDS]
    for backend, case, defect in [*rows, *(("ddp", "full-bf16", f"-{defect}") for defect in DEFECTS)]:
        one, start = tree.folder("single", case), tree.folder("single", f"{case}-start")
        print(
            f"| {backend} {case}{defect} | "
            f"{cell(relative(one, tree.folder(backend, case + defect), start))} |"
        )


def main(precision: str) -> None:
    """Prints one of the tables."""
    with tempfile.TemporaryDirectory() as folder:
        {"fp32": in_fp32, "bf16": in_bf16}[precision](Path(folder))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "fp32")
