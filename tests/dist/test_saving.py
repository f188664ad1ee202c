"""Checkpoints of the divided state alone, and of modules trained whole, on two ranks: gone on with, and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.dist.ranks import run_ranks
from tests.dist.runs import LAYOUTS, Tree, largest, logged, play, weights
from tests.dist.test_resume import compare

SETTINGS = (
    "train.max_steps=4",
    "train.save_every=2",
    "train.eval_every=1",  # each save follows an evaluation, which leaves parameters gathered
    "scheduler=constant",
    *LAYOUTS["pad"],
)
CASES = {
    "tied": ("peft=full", "dist.gather_on_save=false"),
    "untied": ("peft=full", "model.tied=false", "dist.gather_on_save=false"),
    "adapter": ("peft=qlora", "dist.gather_on_save=false"),
    "head": ("peft=lora", "peft.modules_to_save=[lm_head]"),
    "head_sharded": ("peft=lora", "model.tied=false", "peft.modules_to_save=[lm_head]", "dist.gather_on_save=false"),
}
SHARDED = [case for case in CASES if case != "head"]
PAIRS = [(backend, case) for backend in ("zero3", "fsdp") for case in SHARDED] + [("zero2", "head")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Four steps on one process; on two ranks, saved after the second; and these gone on with from there."""
    tree = Tree(tmp_path_factory.mktemp("saving"))

    def frozen(backend: str, case: str, name: str, ranks: int = 2) -> Path:
        given = CASES[case] if backend != "single" else [word for word in CASES[case] if not word.startswith("dist.")]
        return tree.frozen(backend, name, (*given, *SETTINGS), ranks)

    run_ranks(1, play, [frozen("single", case, case, 1) for case in CASES])
    run_ranks(2, play, [frozen(backend, case, case) for backend, case in PAIRS])
    again = [frozen(backend, case, f"{case}-again") for backend, case in PAIRS]
    for folder in again:
        step = Path("checkpoints", "step-2")
        shutil.copytree(folder.with_name(folder.name.removesuffix("-again")) / step, folder / step)
    run_ranks(2, play, again)
    return tree


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_a_run_goes_on_to_the_bit_and_ends_as_one_process_does(tree: Tree, backend: str, case: str) -> None:
    one, whole = tree.folder("single", case), tree.folder(backend, case)
    again = tree.folder(backend, f"{case}-again")
    assert logged(again, "train/loss") == logged(whole, "train/loss")[2:]
    assert largest(logged(one, "valid/loss"), logged(whole, "valid/loss")) < 1e-5
    first, second, third = (weights(folder / "final") for folder in (one, whole, again))
    assert first.keys() == second.keys() == third.keys()
    for name, value in second.items():
        assert torch.equal(value, third[name]), name
        assert float((value - first[name]).abs().max()) < 1e-5, name


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_a_checkpoint_holds_the_model_only_where_it_is_asked_to(tree: Tree, backend: str, case: str) -> None:
    step = tree.folder(backend, case) / "checkpoints" / "step-2"
    assert bool(weights(step)) == ("dist.gather_on_save=false" not in CASES[case])
    assert len(list((step / "state").glob("shard-*"))) == 2


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("case", ["tied", "untied"])
@pytest.mark.parametrize("backend", ["zero3", "fsdp"])
def test_what_was_only_saved_in_parts_ends_as_a_whole_model(tree: Tree, backend: str, case: str) -> None:
    compare(tree.folder(backend, case), "step-4", full=True)
