"""Checkpoints of the divided state alone, and of modules trained whole, on two ranks: gone on with, and
loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.equality import assert_gone_on, differences
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import LAYOUTS, Tree, play, weights
from tests.distributed.test_resume import compare
from tests.selection import long, selected

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
    "head_sharded": (
        "peft=lora",
        "model.tied=false",
        "peft.modules_to_save=[lm_head]",
        "dist.gather_on_save=false",
    ),
}
SHARDED = [case for case in CASES if case != "head"]
ALL = [(backend, case) for backend in ("zero3", "fsdp") for case in SHARDED] + [("zero2", "head")]
LONG = [
    ("zero3", "tied"),
    ("zero3", "adapter"),
    ("zero3", "head_sharded"),
    ("fsdp", "untied"),
    ("fsdp", "adapter"),
]
"""Each backend is among the others, and each way of holding weights: the adapter's of head_sharded, too."""

PAIRS = [long(*pair) if pair in LONG else pair for pair in ALL]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tree:
    """Four steps on one process; on two ranks, saved after the second; and these gone on with from there."""
    tree = Tree(tmp_path_factory.mktemp("saving"))
    pairs = [pair for pair in ALL if pair in selected(request, "backend", "case")]

    def frozen(backend: str, case: str, name: str, ranks: int = 2, start: Path | None = None) -> Path:
        given = (
            CASES[case]
            if backend != "single"
            else [word for word in CASES[case] if not word.startswith("dist.")]
        )
        return tree.frozen(backend, name, (*given, *SETTINGS), ranks, start)

    run_ranks(1, play, [frozen("single", case, case, 1) for case in sorted({case for _, case in pairs})])
    run_ranks(2, play, [frozen(backend, case, case) for backend, case in pairs])
    run_ranks(2, play, [frozen(b, case, f"{case}-again", start=tree.step(b, case, 2)) for b, case in pairs])
    return tree


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_a_run_goes_on_to_the_bit_and_ends_as_one_process_does(tree: Tree, backend: str, case: str) -> None:
    one, whole = tree.folder("single", case), tree.folder(backend, case)
    assert_gone_on(whole, tree.folder(backend, f"{case}-again"), 2)
    found = differences(one, whole, ["valid/loss"])
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_a_checkpoint_holds_the_model_only_where_it_is_asked_to(tree: Tree, backend: str, case: str) -> None:
    step = tree.step(backend, case, 2)
    assert bool(weights(step)) == ("dist.gather_on_save=false" not in CASES[case])
    assert len(list((step / "state").glob("shard-*"))) == 2


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("backend", "case"),
    [("zero3", "untied"), ("fsdp", "tied"), long("zero3", "tied"), long("fsdp", "untied")],
)
def test_what_was_only_saved_in_parts_ends_as_a_whole_model(tree: Tree, backend: str, case: str) -> None:
    compare(tree.folder(backend, case), "step-4", full=True)
