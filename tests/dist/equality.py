"""Runs of two ranks beside runs of one process, and how far they are apart.

For tests/dist and for `python -m benchmarks.equality`, which prints what the tests bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.dist.ranks import run_ranks
from tests.dist.runs import BACKENDS, LAYOUTS, Tree, largest, logged, play, weights

PEFTS = ("full", "lora", "qlora")
MATRIX = {f"{peft}-{layout}": (f"peft={peft}", *LAYOUTS[layout]) for peft in PEFTS for layout in LAYOUTS}
"""Overrides of each case that every backend must do like one process."""

SERIES = ("train/loss", "valid/loss", "grad_norm")
"""What is compared at every logged step: objective, validation loss, gradient norm before clipping."""


def play_beside_single(
    tree: Tree, cases: Mapping[str, Sequence[str]], backends: Sequence[str] = BACKENDS, ranks: int = 2
) -> None:
    """Runs each case in one process, and on `ranks` ranks of each backend."""
    run_ranks(1, play, [tree.frozen("single", case, overrides, 1) for case, overrides in cases.items()])
    both = [(backend, case) for backend in backends for case in cases]
    run_ranks(ranks, play, [tree.frozen(backend, case, cases[case], ranks) for backend, case in both])


def differences(one: Path, two: Path) -> dict[str, float]:
    """Returns the largest absolute difference of each of SERIES, and of the final weights as `weights`."""
    found = {name: largest(logged(one, name), logged(two, name)) for name in SERIES}
    first, second = weights(one / "final"), weights(two / "final")
    assert first.keys() == second.keys()
    found["weights"] = max(float((value - second[name]).abs().max()) for name, value in first.items())
    return found
