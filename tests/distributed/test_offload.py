"""Parts kept in the CPU's memory: on a CPU nothing moves, but what computes there is what a GPU run uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.equality import assert_gone_on, differences
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import LAYOUTS, Tree, play

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.long]

CASES = {
    "optimizer-full": ("zero2", "peft=full", "dist.offload_optimizer=true"),
    "stage1-full": ("zero2", "peft=full", "dist.offload_optimizer=true", "dist.stage=1"),
    "optimizer3-full": ("zero3", "peft=full", "dist.offload_optimizer=true"),
    "both-full": ("zero3", "peft=full", "dist.offload_optimizer=true", "dist.offload_parameters=true"),
    "parameters-lora": ("zero3", "peft=lora", "dist.offload_parameters=true"),
    "parameters-qlora": ("zero3", "peft=qlora", "dist.offload_parameters=true"),
    "fsdp-full": ("fsdp", "peft=full", "dist.offload=true"),
    "fsdp-qlora": ("fsdp", "peft=qlora", "dist.offload=true"),
}
PEFTS = ("full", "lora", "qlora")
RESUMED = ("optimizer-full", "both-full", "fsdp-full")
SETTINGS = (
    "train.max_steps=4",
    "train.eval_every=4",
    "train.save_every=2",
    "scheduler=constant",
    *LAYOUTS["pad"],
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Four steps of two micro-batches on one process, and on two ranks with each offload; some also from step
    2 on."""
    tree = Tree(tmp_path_factory.mktemp("offload"))
    run_ranks(1, play, [tree.frozen("single", peft, (f"peft={peft}", *SETTINGS), 1) for peft in PEFTS])

    def frozen(case: str, name: str, start: Path | None = None) -> Path:
        backend, *given = CASES[case]
        return tree.frozen(backend, name, (*given, *SETTINGS), start=start)

    run_ranks(2, play, [frozen(case, case) for case in CASES])
    run_ranks(
        2, play, [frozen(case, f"{case}-again", tree.step(CASES[case][0], case, 2)) for case in RESUMED]
    )
    return tree


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_in_the_cpus_memory_is_trained_the_same(tree: Tree, case: str) -> None:
    one, two = tree.folder("single", case.split("-")[1]), tree.folder(CASES[case][0], case)
    found = differences(one, two)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_was_interrupted_is_the_same_to_the_bit(tree: Tree, case: str) -> None:
    backend = CASES[case][0]
    assert_gone_on(tree.folder(backend, case), tree.folder(backend, f"{case}-again"), 2)
