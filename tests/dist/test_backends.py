"""Whole runs of every backend on two ranks against one process: losses, gradient norms, weights, resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mft.dist.deepspeed import Zero2, Zero3, merged
from mft.errors import UserError
from tests.dist.ranks import run_ranks
from tests.dist.runs import LAYOUTS, frozen, logged, play, weights, write_tasks

BACKENDS = ("ddp", "zero2", "zero3", "fsdp")
PEFTS = ("full", "lora", "qlora")
ALL = [(peft, layout) for peft in PEFTS for layout in LAYOUTS]
OTHER = {
    "adaptive": ("peft=full", "loss=famo", *LAYOUTS["pack"]),
    "checkpointing": ("peft=qlora", "model.gradient_checkpointing=true", *LAYOUTS["pad"]),
    "untied": ("peft=full", "model.tied=false", *LAYOUTS["pad"]),
}
"""Further runs of each backend: a loss mode that runs the micro-batches without gradient too, and so on."""

RESUMED = ("train.save_every=10", "peft=lora", "peft.dropout=0.1", *LAYOUTS["pad"])
FORCED = {"zero3": ["dist.persistence_threshold=0"]}
"""Tiny weights are below ZeRO-3's threshold and would stay whole."""


class Tree:
    """The runs of this module, in a folder."""

    def __init__(self, root: Path):
        self.root = root
        self.data = [f"cache_dir={root / 'cache'}", f"data.paths=[{','.join(map(str, write_tasks(root / 'tasks')))}]"]

    def folder(self, backend: str, case: str) -> Path:
        return self.root / f"{backend}-{case}"

    def frozen(self, backend: str, case: str, overrides: tuple[str, ...]) -> Path:
        ranks = 1 if backend == "single" else 2
        settings = [*self.data, f"dist={backend}", f"launch.nproc={ranks}", *FORCED.get(backend, []), *overrides]
        return frozen(self.folder(backend, case), settings)

    def matrix(self, backend: str) -> list[Path]:
        folders = [self.frozen(backend, f"{peft}-{layout}", (f"peft={peft}", *LAYOUTS[layout])) for peft, layout in ALL]
        return folders + [self.frozen(backend, case, overrides) for case, overrides in OTHER.items()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("backends"))
    run_ranks(1, play, tree.matrix("single"))
    for backend in BACKENDS:
        whole = tree.frozen(backend, "resumed", RESUMED)
        run_ranks(2, play, [*tree.matrix(backend), whole])
        again = tree.frozen(backend, "again", RESUMED)
        shutil.copytree(whole / "checkpoints" / "step-10", again / "checkpoints" / "step-10")
        run_ranks(2, play, [again])
    return tree


def largest(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


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


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tree: Tree, backend: str) -> None:
    whole, again = tree.folder(backend, "resumed"), tree.folder(backend, "again")
    assert logged(again, "train/loss") == logged(whole, "train/loss")[10:]
    assert logged(again, "grad_norm") == logged(whole, "grad_norm")[10:]
    first, second = weights(whole / "final"), weights(again / "final")
    assert all(bool((value == second[name]).all()) for name, value in first.items())


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
