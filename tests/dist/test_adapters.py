"""Adapters that are more than matrices beside linear layers, on two ranks of each backend against one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.model.tiny import Tiny
from tests.dist.ranks import run_ranks
from tests.dist.runs import LAYOUTS, frozen, logged, play, weights, write_tasks
from tests.model.mixtures import mixture_folder

TOKENS = ",".join(f'"w{i} x"' for i in range(40))  # more than the tiny model has spare rows for
CASES = {
    "experts": ("peft=lora", "peft.experts=true", "peft.rank=4"),
    "tied_head": ("model=tiny", "peft=lora", "peft.modules_to_save=[lm_head]"),
    "dora_4_bit": ("model=tiny", "peft=qlora", "peft.use_dora=true"),
    "pissa": ("model=tiny", "peft=lora", "peft.init=pissa"),
    "tokens": ("model=tiny", "peft=lora", f'model.add_tokens=["return value",{TOKENS}]'),
    "tokens_full": ("model=tiny", "model.tied=false", "peft=full", f'model.add_tokens=["return value",{TOKENS}]'),
}
BACKENDS = {
    "ddp": ("experts", "pissa", "tokens", "tokens_full"),
    "zero2": ("dora_4_bit", "pissa", "tokens", "tied_head"),
    "zero3": ("experts", "tied_head"),  # the others read whole weights, and are refused
    "fsdp": tuple(CASES),
}
PAIRS = [(backend, case) for backend, cases in BACKENDS.items() for case in cases]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    base = mixture_folder("qwen3_moe", root / "base", Tiny(cache_dir=str(root / "cache")).tokenizer())
    # the router's loss is a mean over micro-batches, the one thing that depends on how a step is divided
    mixture = ("model=qwen3_moe", f"model.path={base}", "model.eos_token=null", "model.router_coef=0")
    data = [f"cache_dir={root / 'cache'}", f"data.paths=[{','.join(map(str, write_tasks(root / 'tasks')))}]"]

    def run(backend: str, case: str) -> Path:
        settings = [*data, f"dist={backend}", f"launch.nproc={1 if backend == 'single' else 2}", *LAYOUTS["pad"]]
        settings += ["train.max_steps=3", "train.eval_every=3", *(mixture if case == "experts" else ()), *CASES[case]]
        settings += ["dist.persistence_threshold=0"] if backend == "zero3" else []
        return frozen(root / f"{backend}-{case}", settings)

    run_ranks(1, play, [run("single", case) for case in CASES])
    for backend, cases in BACKENDS.items():
        run_ranks(2, play, [run(backend, case) for case in cases])
    return root


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_two_ranks_do_what_one_process_does(root: Path, backend: str, case: str) -> None:
    one, two = root / f"single-{case}", root / f"{backend}-{case}"
    for name in ("train/loss", "valid/loss", "grad_norm"):
        pairs = list(zip(logged(one, name), logged(two, name), strict=True))
        assert pairs and max(abs(a - b) for a, b in pairs) < 1e-5, name
    first, second = weights(one / "final"), weights(two / "final")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) < 1e-5, name
