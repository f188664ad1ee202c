"""Where a linear layer and its adapter are one function: on every backend that has whole weights while a
layer computes. That they compute the same is held by test_backends.py and test_descent.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mft.model.peft.fused import described
from mft.model.peft.lora import Lora
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engines import backend
from tests.model.rows import batch, inputs

pytestmark = [pytest.mark.slow, pytest.mark.dist]

FUSED = "fused in 14 of 14 layers"
BY_PEFT = "fused in 0 of 14 layers, peft's own path in 14 (hooks of single modules)"


def computed(names: list[str], cache_dir: str) -> dict[str, tuple[str, str, int]]:
    """Returns for each backend how the adapters are computed, as told before and after the backend prepares
    the model, and how many functions the graph of a bf16 step has."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    family, peft, found = Tiny(cache_dir=cache_dir), Lora(), {}
    for name in names:
        engine = backend(name).start("bf16", cpu=True)
        with engine.loading():
            base = family.model(torch.bfloat16)
        module = TokenLoss(peft.attach(base, family), family)
        before = described(module)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
        prepared, _ = engine.prepare(module, optimizer)
        nll_BT, _ = prepared(*inputs(batch([[20, 9]], 32, 512)))
        nodes, seen = [nll_BT.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [following for following, _ in node.next_functions]
        found[name] = before, described(module), sum(n.name() == "LowRankLinearBackward" for n in seen)
        engine.backward(nll_BT.sum())
        engine.close()
    return found


def test_every_backend_with_whole_weights_fuses(cache_dir: Path) -> None:
    for rank in run_ranks(2, computed, ["ddp", "zero2", "zero3", "fsdp"], str(cache_dir)):
        assert rank.pop("zero3") == (BY_PEFT, BY_PEFT, 0)
        assert set(rank.values()) == {(FUSED, FUSED, 14)}
