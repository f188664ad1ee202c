"""Losses of single rows, the test of the best checkpoint, and the tokens of a run, on any backend as in one
process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mft.run_folder import metric_rows
from mft.training.metrics import CLOCKED
from mft.training.sample_losses import read
from mft.training.weights_only import is_weights_only
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import BACKENDS, LAYOUTS, Tree, play
from tests.selection import long, selected

pytestmark = [pytest.mark.slow, pytest.mark.dist]

SETTINGS = (
    "data.split=[60,20,20]",
    "optimizer.lr=5e-2",  # the best validation is not the last one
    "scheduler=constant",
    "train.max_steps=5",
    "train.eval_every=1",
    "train.eval_samples=null",
    "train.save_every=1",
    "train.sample_losses=all",
    "train.save_state=last",  # the best checkpoint is weights-only when it is tested
)
CASES = {
    f"{peft}-{layout}": (f"peft={peft}", *LAYOUTS[layout]) for peft in ("full", "lora") for layout in LAYOUTS
}
QUICK = {("ddp", "lora-pad"), ("zero3", "full-pack")}
"""Whole and divided weights, each peft mode and each layout; in `make check-all` each on every backend."""

PAIRS = [
    (backend, case) if (backend, case) in QUICK else long(backend, case)
    for backend in BACKENDS
    for case in CASES
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tree:
    tree, pairs = Tree(tmp_path_factory.mktemp("tests")), sorted(selected(request, "backend", "case"))

    def frozen(backend: str, case: str, ranks: int) -> Path:
        return tree.frozen(backend, case, (*SETTINGS, *CASES[case]), ranks)

    run_ranks(1, play, [frozen("single", case, 1) for case in sorted({case for _, case in pairs})])
    run_ranks(2, play, [frozen(backend, case, 2) for backend, case in pairs])
    return tree


def end(run: Path) -> dict[str, Any]:
    """Returns the last row of metrics.jsonl without what depends on the clock, and on how ranks pad."""
    return {
        name: value
        for name, value in metric_rows(run / "metrics.jsonl")[0][-1].items()
        if not name.startswith((*CLOCKED, "total/all_tokens"))
    }


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_two_ranks_of_any_backend_find_for_every_row_what_one_process_does(
    tree: Tree, backend: str, case: str
) -> None:
    one, two = tree.folder("single", case), tree.folder(backend, case)
    names = sorted(path.stem for path in (one / "sample_losses").iterdir())
    assert names == sorted(path.stem for path in (two / "sample_losses").iterdir())
    (tested,) = (name for name in names if name.startswith("test"))
    assert len(names) == 7 and int(tested.removeprefix("test-")) == end(one)["best/step"] < 5
    for name in names:
        split, _, step = name.partition("-")
        alone, together = read(one, split, int(step)), read(two, split, int(step))
        assert alone is not None and together is not None and len(alone) > 10
        assert alone[["task", "row", "tokens"]].equals(together[["task", "row", "tokens"]])
        # gradients are added up in fp32 in another order, through at most five steps of AdamW at a large lr,
        # which makes of a rounding error up to 1e-5 of a loss
        np.testing.assert_allclose(together.loss, alone.loss, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_the_best_checkpoint_is_tested_and_the_cost_is_the_same(tree: Tree, backend: str, case: str) -> None:
    alone, together = end(tree.folder("single", case)), end(tree.folder(backend, case))
    best = tree.folder(backend, case) / "checkpoints" / f"step-{together['test/step']}"
    assert is_weights_only(best) and not list((best / "state").glob("optimizer-*"))
    exact = ("best/step", "test/step", "total/tokens", "total/flops")
    assert {name: alone[name] for name in exact} == {name: together[name] for name in exact}
    assert together == pytest.approx(alone, rel=1e-5)
    summary = json.loads((tree.folder(backend, case) / "summary.json").read_text())
    assert summary["test"]["test/loss"] == together["test/loss"]
    # the last weights, which were in memory before, are further from the best ones than any rounding
    assert abs(summary["last"]["valid/loss"] - summary["best"]["valid/loss"]) > 1e-3
