"""Gradient descent on two ranks against one process: what AdamW would hide, clipping and the rounding of
bf16.

A bound is worth something if a defect breaks it, so the same runs are made with defects put in.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mft.training import loop
from tests.distributed.equality import DESCENT, START, play_beside_single, relative, update
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import BACKENDS, Tree, logged, play

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.long]

TIGHT = 0.05
"""Far below every gradient's norm."""
CASES = {
    "tight": ("peft=full", "train.max_steps=1", f"train.max_grad_norm={TIGHT}"),
    "free": ("peft=full", "train.max_steps=1", "train.max_grad_norm=null"),
    "full-bf16": ("peft=full", "train.max_steps=4", "train.precision=bf16"),
    "lora-bf16": ("peft=lora", "train.max_steps=4", "train.precision=bf16"),
}
CASES = {case: (*DESCENT, *overrides) for case, overrides in CASES.items()}
BACKENDS_OF = {
    "tight": BACKENDS,
    "free": ("zero2", "zero3"),  # DeepSpeed alone clips at 1.0 where it is told 0
    "full-bf16": BACKENDS,
    "lora-bf16": ("zero3", "fsdp"),
}
STARTS = {"full-start": (*DESCENT, "peft=full", *START)}
STARTS |= {
    f"{peft}-bf16-start": (*DESCENT, f"peft={peft}", "train.precision=bf16", *START)
    for peft in ("full", "lora")
}
BF16 = {"train/loss": 1e-3, "grad_norm": 1e-2, "update": 1e-2}
"""Bounds of the relative differences; docs/distribution.md says what was measured and what defects do."""


def play_with(run_dirs: list[Path], defect: str) -> None:
    """Plays runs in which every share counts twice (doubled), or those of the last rank count nothing
    (left_out)."""
    right, rank = loop.propagate_nonfinite, int(os.environ["RANK"])
    factor = {"doubled": 2.0, "left_out": 1.0 - rank}[defect]
    loop.propagate_nonfinite = lambda objective: right(objective) * factor  # type: ignore[assignment]
    play(run_dirs)
    loop.propagate_nonfinite = right  # type: ignore[assignment]


DEFECTS = {
    "doubled": ["grad_norm"],  # the update is clipped to the same size
    "left_out": ["train/loss", "grad_norm", "update"],
    "clipped": ["train/loss", "grad_norm", "update"],  # to half of what is asked
}
"""What each defect breaks."""


def play_defects(tree: Tree) -> None:
    """Runs full-bf16 with each defect on two ranks of ddp."""
    for defect in ("doubled", "left_out"):
        run_ranks(2, play_with, [tree.frozen("ddp", f"full-bf16-{defect}", CASES["full-bf16"])], defect)
    run_ranks(
        2, play, [tree.frozen("ddp", "full-bf16-clipped", (*CASES["full-bf16"], "train.max_grad_norm=0.25"))]
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("descent"))
    play_beside_single(tree, STARTS | CASES, BACKENDS_OF)
    play_defects(tree)
    return tree


def pairs(*cases: str) -> list[tuple[str, str]]:
    return [(backend, case) for case in cases for backend in BACKENDS_OF[case]]


@pytest.mark.parametrize(("backend", "case"), pairs("tight", "free"))
def test_gradients_are_clipped_once_to_what_is_asked(tree: Tree, backend: str, case: str) -> None:
    one, two, start = (
        tree.folder(*run) for run in (("single", case), (backend, case), ("single", "full-start"))
    )
    found = relative(one, two, start)
    assert max(found.values()) < 1e-5, found
    (norm,) = logged(two, "grad_norm")  # before clipping
    assert norm > 2
    # by float32 differences of weights that are up to a hundred times as large as what is added to them
    assert float(update(two, start).norm()) == pytest.approx(
        0.1 * (TIGHT if case == "tight" else norm), rel=1e-3
    )


@pytest.mark.parametrize(("backend", "case"), pairs("full-bf16", "lora-bf16"))
def test_bf16_is_within_its_rounding(tree: Tree, backend: str, case: str) -> None:
    found = relative(
        tree.folder("single", case), tree.folder(backend, case), tree.folder("single", f"{case}-start")
    )
    assert all(found[name] < bound for name, bound in BF16.items()), found


@pytest.mark.parametrize(("defect", "broken"), DEFECTS.items())
def test_a_defect_breaks_the_bounds_of_bf16(tree: Tree, defect: str, broken: list[str]) -> None:
    two = tree.folder("ddp", f"full-bf16-{defect}")
    found = relative(tree.folder("single", "full-bf16"), two, tree.folder("single", "full-bf16-start"))
    assert all(found[name] > 3 * BF16[name] for name in broken), found
