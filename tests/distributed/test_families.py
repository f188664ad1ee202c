"""A dense family and one with experts on two ranks of DDP, ZeRO-3 and FSDP against one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.model.tiny import byte_tokenizer
from tests.distributed.equality import differences
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import LAYOUTS, Tree, logged, play
from tests.model.families import V, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.long]

BACKENDS = ("ddp", "zero3", "fsdp")
CASES = [(name, peft) for name in ("qwen3", "qwen3_moe") for peft in ("full", "lora")]


def matrix(tree: Tree, backend: str) -> list[Path]:
    """Returns the frozen runs of a backend."""
    runs = []
    for name, peft in CASES:
        asked = [f"model={name}", f"model.path={tree.root / name}", "model.eos_token=null", f"peft={peft}"]
        # the balance loss is a mean over micro-batches, so it is another one on two ranks
        asked += ["train.max_steps=4", "train.eval_every=4", "model.router_coef=0" * (name == "qwen3_moe")]
        asked += LAYOUTS["pack"]
        runs.append(
            tree.frozen(backend, f"{name}-{peft}", [a for a in asked if a], 1 if backend == "single" else 2)
        )
    return runs


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("families"))
    for name in {name for name, _ in CASES}:
        tiny_model(name).save_pretrained(tree.root / name)
        byte_tokenizer(V).save_pretrained(tree.root / name)
    run_ranks(1, play, matrix(tree, "single"))
    run_ranks(2, play, [folder for backend in BACKENDS for folder in matrix(tree, backend)])
    return tree


@pytest.mark.parametrize("case", [f"{name}-{peft}" for name, peft in CASES])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_family_on_two_ranks(tree: Tree, backend: str, case: str) -> None:
    one, two = tree.folder("single", case), tree.folder(backend, case)
    for name, steps in (("train/loss", 4), ("grad_norm", 4), ("valid/loss", 2)):
        assert len(logged(two, name)) == steps
    found = differences(one, two)
    assert max(found.values()) < 1e-5, found
