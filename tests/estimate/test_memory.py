"""What a rank needs of memory, by part, counted on real models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mft.distributed.ddp import Ddp, Single
from mft.distributed.deepspeed import Zero2, Zero3
from mft.distributed.fsdp import Fsdp
from mft.estimate import memory
from mft.model.checkpointing import Layers
from mft.model.meta_model import skeleton
from mft.model.peft.full import Full, compute_dtype
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.peft.summary import total_of
from mft.model.tiny import Tiny
from mft.optim.optimizers import AdamW, AdamW8bit
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engines import backend

PEFTS = {"full": Full(), "lora": Lora(), "qlora": QLora()}


def facts(family: Tiny, peft: Full, engine: Any) -> tuple[memory.Sizes, Layers]:
    with engine.loading():
        base = family.model(torch.float32, peft.quantization(torch.float32))
    model = peft.attach(base, family)
    layers = Layers.of(model, family.layer_classes(model), half=False, longest=64)
    return memory.Sizes.of(model, peft.audit(model)), layers


def table(names: list[str], cache_dir: str) -> dict[tuple[str, str], tuple[Any, Any]]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    family, found = Tiny(cache_dir=cache_dir), {}
    for name in names:
        for kind, peft in PEFTS.items():
            engine = (Single() if name == "single" else backend(name)).start("fp32", cpu=True)
            found[name, kind] = facts(family, peft, engine)
            engine.close()
    return found


@pytest.mark.slow
@pytest.mark.dist
def test_all_ranks_of_all_backends_count_alike(cache_dir: Path) -> None:
    (single,) = run_ranks(1, table, ["single"], str(cache_dir))
    for rank in run_ranks(2, table, ["ddp", "zero2", "zero3", "fsdp"], str(cache_dir)):
        for (name, kind), (sizes, layers) in rank.items():
            expected, expected_layers = single["single", kind]
            assert (sizes.trained, sizes.whole, layers) == (expected.trained, expected.whole, expected_layers)
            # of packed weights that are not read yet the scales are estimated
            assert sizes.frozen_bytes == pytest.approx(expected.frozen_bytes, rel=0.1), (name, kind)


def test_what_is_not_kept_for_the_backward_pass_by_hand(tiny: Tiny) -> None:
    model, layers = tiny.model(torch.float32), Layers(2, 0.0, 0.0, 1000)
    config = tiny.config()
    held, logits = {"weights": 500.0, "gradients": 300.0}, 10 * 64 * config.vocab_size
    table = config.vocab_size * config.hidden_size
    assert memory.beside_activations(model, held, layers, 64, False, 7) == 800 + logits + 2 * 7
    divided = memory.beside_activations(model, held, layers, 64, True, 7)
    assert divided == 800 + logits + 2 * 2 * (1000 + table)
    many = memory.beside_activations(model, held, layers, 10**9, False, 0)
    assert many == 800 + 10 * 2**28  # the largest chunk


@pytest.mark.parametrize(
    "peft", [Full(), Lora(use_dora=True), QLora(), QLora(bits=8), QLora(double_quant=False)]
)
def test_a_model_without_weights_counts_the_bytes_of_a_loaded_one(peft: Full, tiny: Tiny) -> None:
    computing = compute_dtype("bf16")
    quantization, dtype = peft.quantization(computing), peft.dtype("bf16")
    loaded = peft.audit(peft.attach(tiny.model(dtype, quantization, compute_dtype=computing), tiny))
    meta = peft.attach(skeleton(tiny.config(), quantization, dtype), tiny)
    computed = peft.audit(meta)
    for field in ("parameters", "trainable", "adapted"):
        assert total_of(computed, field) == total_of(loaded, field)
    # the small constants of double quantisation are not counted
    assert total_of(computed, "bytes") == pytest.approx(total_of(loaded, "bytes"), rel=0.03)


def test_memory_by_backend() -> None:
    sizes = memory.Sizes(trained=1000, frozen_bytes=8000, whole=False)
    of = {
        "ddp": memory.by_part(sizes, Ddp(), 4, True, 8),
        "zero2": memory.by_part(sizes, Zero2(), 4, True, 8),
        "stage 1": memory.by_part(sizes, Zero2(stage=1), 4, True, 8),
        "zero3": memory.by_part(sizes, Zero3(), 4, True, 8),
        "zero3 in fp32": memory.by_part(sizes, Zero3(), 4, False, 8),
        "fsdp": memory.by_part(sizes, Fsdp(), 4, True, 8),
    }
    assert {name: tuple(parts.values()) for name, parts in of.items()} == {
        "ddp": (12000, 4000, 8000),
        "zero2": (10000, 500, 3000),
        "stage 1": (10000, 2000, 3000),
        "zero3": (2500, 500, 3000),
        "zero3 in fp32": (3000, 1000, 2000),
        "fsdp": (3000, 1000, 2000),
    }


def test_states_of_an_optimizer_are_measured() -> None:
    assert memory.optimizer_bytes(AdamW(), 1e-4) == 8
    assert 2 <= memory.optimizer_bytes(AdamW8bit(), 1e-4) < 2.2
