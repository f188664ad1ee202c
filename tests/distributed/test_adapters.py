"""Adapters that are more than matrices beside linear layers, on two ranks of each backend against one
process."""

from __future__ import annotations

import pytest

from mft.model.tiny import Tiny
from tests.distributed.equality import differences, play_beside_single
from tests.distributed.runs import LAYOUTS, Tree
from tests.model.mixtures import mixture_folder

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.long]

TOKENS = ",".join(f'"w{i} x"' for i in range(40))  # more than the tiny model has spare rows for
CASES = {
    "experts": ("peft=lora", "peft.experts=true", "peft.rank=4"),
    "tied_head": ("model=tiny", "peft=lora", "peft.modules_to_save=[lm_head]"),
    "dora_4_bit": ("model=tiny", "peft=qlora", "peft.use_dora=true"),
    "pissa": ("model=tiny", "peft=lora", "peft.init=pissa"),
    "tokens": ("model=tiny", "peft=lora", f'model.add_tokens=["return value",{TOKENS}]'),
    "tokens_full": (
        "model=tiny",
        "model.tied=false",
        "peft=full",
        f'model.add_tokens=["return value",{TOKENS}]',
    ),
}
BACKENDS = {
    "ddp": ("experts", "pissa", "tokens", "tokens_full"),
    "zero2": ("dora_4_bit", "pissa", "tokens", "tied_head"),
    "zero3": ("experts", "tied_head"),  # the others read whole weights, and are refused
    "fsdp": tuple(CASES),
}
PAIRS = [(backend, case) for backend, cases in BACKENDS.items() for case in cases]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("adapters"))
    base = mixture_folder(
        "qwen3_moe", tree.root / "base", Tiny(cache_dir=str(tree.root / "cache")).tokenizer()
    )
    # the router's loss is a mean over micro-batches, the one thing that depends on how a step is divided
    mixture = ("model=qwen3_moe", f"model.path={base}", "model.eos_token=null", "model.router_coef=0")
    steps = ("train.max_steps=3", "train.eval_every=3", *LAYOUTS["pad"])
    cases = {case: (*(mixture if case == "experts" else ()), *steps, *given) for case, given in CASES.items()}
    play_beside_single(tree, cases, {case: [b for b, of in BACKENDS.items() if case in of] for case in cases})
    return tree


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_two_ranks_do_what_one_process_does(tree: Tree, backend: str, case: str) -> None:
    found = differences(tree.folder("single", case), tree.folder(backend, case))
    assert max(found.values()) < 1e-5, found
