"""Parts kept in the CPU's memory: on a CPU nothing moves, but what computes there is what a GPU run uses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.dist.ranks import run_ranks
from tests.dist.runs import LAYOUTS, Tree, largest, logged, play, weights

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
SETTINGS = ("train.max_steps=4", "train.eval_every=4", "train.save_every=2", "scheduler=constant", *LAYOUTS["pad"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Four steps of two micro-batches on one process, and on two ranks with each offload; some also from step 2 on."""
    tree = Tree(tmp_path_factory.mktemp("offload"))
    run_ranks(1, play, [tree.frozen("single", peft, (f"peft={peft}", *SETTINGS), 1) for peft in PEFTS])
    run_ranks(2, play, [tree.frozen(b, case, (*given, *SETTINGS)) for case, (b, *given) in CASES.items()])
    again = [tree.frozen(CASES[case][0], f"{case}-again", (*CASES[case][1:], *SETTINGS)) for case in RESUMED]
    for folder in again:
        step = Path("checkpoints", "step-2")
        shutil.copytree(folder.with_name(folder.name.removesuffix("-again")) / step, folder / step)
    run_ranks(2, play, again)
    return tree


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_in_the_cpus_memory_is_trained_the_same(tree: Tree, case: str) -> None:
    one, two = tree.folder("single", case.split("-")[1]), tree.folder(CASES[case][0], case)
    for name in ("train/loss", "valid/loss", "grad_norm"):
        assert largest(logged(one, name), logged(two, name)) < 1e-5, name
    first, second = weights(one / "final"), weights(two / "final")
    assert first.keys() == second.keys()
    assert all(float((value - second[name]).abs().max()) < 1e-5 for name, value in first.items())


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_was_interrupted_is_the_same_to_the_bit(tree: Tree, case: str) -> None:
    whole, again = tree.folder(CASES[case][0], case), tree.folder(CASES[case][0], f"{case}-again")
    assert logged(again, "train/loss") == logged(whole, "train/loss")[2:]
    first, second = weights(whole / "final"), weights(again / "final")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
