"""Runs of two ranks beside runs of one process, and how far they are apart.

For tests/distributed and for `python -m benchmarks.equality`, which prints what the tests bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import BACKENDS, LAYOUTS, Tree, largest, logged, play, weights

PEFTS = ("full", "lora", "qlora")
MATRIX = {f"{peft}-{layout}": (f"peft={peft}", *LAYOUTS[layout]) for peft in PEFTS for layout in LAYOUTS}
"""Overrides of each case that every backend must do like one process."""

SERIES = ("train/loss", "valid/loss", "grad_norm")
"""What is compared at every logged step: objective, validation loss, gradient norm before clipping."""


def play_beside_single(
    tree: Tree, cases: Mapping[str, Sequence[str]], backends: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Runs each case in one process, and on two ranks of each backend (or of those that `backends` has for
    it)."""
    run_ranks(1, play, [tree.frozen("single", case, overrides, 1) for case, overrides in cases.items()])
    both = [
        (backend, case)
        for case in cases
        for backend in (BACKENDS if backends is None else backends.get(case, ()))
    ]
    run_ranks(2, play, [tree.frozen(backend, case, cases[case]) for backend, case in both])


def differences(one: Path, two: Path, series: Sequence[str] = SERIES) -> dict[str, float]:
    """Returns the largest absolute difference of each logged series, and of the final weights as
    `weights`."""
    found = {name: largest(logged(one, name), logged(two, name)) for name in series}
    first, second = weights(one / "final"), weights(two / "final")
    assert first.keys() == second.keys()
    found["weights"] = max(float((value - second[name]).abs().max()) for name, value in first.items())
    return found


def assert_gone_on(whole: Path, again: Path, steps: int) -> None:
    """Asserts that a run which began at a checkpoint of `whole` after that many steps is the rest of it, to
    the bit."""
    for name in ("train/loss", "grad_norm"):
        assert logged(again, name) == logged(whole, name)[steps:]
    first, second = weights(whole / "final"), weights(again / "final")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


DESCENT = (
    "optimizer.beta1=0.0",
    "optimizer.beta2=0.0",
    "optimizer.eps=1e4",
    "optimizer.lr=1e3",
    "scheduler=constant",
    "train.eval_at_start=false",
    "train.eval_every=null",
    "train.eval_samples=2",
    *LAYOUTS["pad"],
)
"""AdamW as gradient descent with learning rate 0.1: beside an eps of 1e4 the gradient's own size vanishes.
AdamW as it is divides by that size, and so hides a gradient that is doubled or clipped too much."""

START = ("optimizer.lr=1e-12", "train.max_steps=1")
"""Ends with the weights that the run starts from."""


def relative(one: Path, two: Path, start: Path) -> dict[str, float]:
    """Returns the largest relative difference of losses and of gradient norms, and that of the whole update:
    the norm of what the updates differ by over the norm of the first. start: a run with the weights before
    the first step."""
    found = {}
    for name in ("train/loss", "grad_norm"):
        pairs = zip(logged(one, name), logged(two, name), strict=True)
        found[name] = max(abs(a - b) / abs(a) for a, b in pairs)
    rounds = "zero" in two.name and "bf16" in two.name  # DeepSpeed rounds the weights that it starts from
    first, second = update(one, start), update(two, start, rounds)
    return found | {"update": float((first - second).norm() / first.norm())}


def update(run_dir: Path, start: Path, rounds: bool = False) -> torch.Tensor:
    """Returns what a run has added to the weights it began with, as one vector; rounds: it rounded them to
    bf16."""
    before, after = weights(start / "final"), weights(run_dir / "final")
    assert before.keys() == after.keys()
    began = {name: value.bfloat16() if rounds else value for name, value in before.items()}
    return torch.cat([(value.double() - began[name].double()).flatten() for name, value in after.items()])
