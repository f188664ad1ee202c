"""Whole runs of every backend on two ranks against one process: losses, gradient norms, weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.dist.deepspeed import Zero2, Zero3, merged
from mft.errors import UserError
from tests.dist.ranks import run_ranks
from tests.dist.runs import BACKENDS, LAYOUTS, Tree, largest, logged, play, weights

PEFTS = ("full", "lora", "qlora")
ALL = [(peft, layout) for peft in PEFTS for layout in LAYOUTS]
OTHER = {
    "adaptive": ("peft=full", "loss=famo", *LAYOUTS["pack"]),
    "checkpointing": ("peft=qlora", "model.gradient_checkpointing=true", *LAYOUTS["pad"]),
    "untied": ("peft=full", "model.tied=false", *LAYOUTS["pad"]),
}
"""Further runs of each backend: a loss mode that runs the micro-batches without gradient too, and so on."""


def matrix(tree: Tree, backend: str) -> list[Path]:
    """Returns the frozen runs of a backend."""
    ranks = 1 if backend == "single" else 2
    cases = {f"{peft}-{layout}": (f"peft={peft}", *LAYOUTS[layout]) for peft, layout in ALL} | OTHER
    return [tree.frozen(backend, case, overrides, ranks) for case, overrides in cases.items()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("backends"))
    run_ranks(1, play, matrix(tree, "single"))
    run_ranks(2, play, [folder for backend in BACKENDS for folder in matrix(tree, backend)])
    return tree


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("case", [*(f"{peft}-{layout}" for peft, layout in ALL), *OTHER])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_of_any_backend_do_what_one_process_does(tree: Tree, backend: str, case: str) -> None:
    one, two = tree.folder("single", case), tree.folder(backend, case)
    assert len(logged(two, "train/loss")) == 20
    assert largest(logged(one, "train/loss"), logged(two, "train/loss")) < 1e-5
    assert largest(logged(one, "valid/loss"), logged(two, "valid/loss")) < 1e-5
    assert largest(logged(one, "grad_norm"), logged(two, "grad_norm")) < 1e-5
    assert max(logged(one, "grad_norm")) > 0.5  # clipping took place
    first, second = weights(one / "final"), weights(two / "final")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) < 1e-5, name


def test_raw_config_is_merged_over_ours_and_may_not_say_what_a_setting_says() -> None:
    base = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    assert merged(base, {"zero_optimization": {"overlap_comm": False}, "x": 1}) == {
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "x": 1,
    }
    with pytest.raises(UserError, match=r"dist\.config\.gradient_clipping is decided by train\.max_grad_norm"):
        Zero2(config={"gradient_clipping": 1.0}).check()
    with pytest.raises(UserError, match=r"zero_optimization\.stage is decided by dist"):
        Zero3(config={"zero_optimization": {"stage": 1}}).check()
    with pytest.raises(UserError, match=r"stage 3 is dist=zero3"):
        Zero2(stage=3).check()
