"""Small models of real architectures, and what is computed from the model without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from mft.distributed.ddp import Ddp
from mft.distributed.deepspeed import Zero2, Zero3
from mft.distributed.fsdp import Fsdp
from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.meta_model import skeleton
from mft.model.peft.full import Full, compute_dtype
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.peft.summary import total_of
from mft.model.tiny import Tiny
from mft.optim.optimizers import AdamW, AdamW8bit
from mft.rehearsal.estimate import Sizes, checkpoint_words, memory, optimizer_bytes
from mft.rehearsal.stand_in import stand_in

V = 1000
CONFIGS = {
    "grouped": transformers.LlamaConfig(num_hidden_layers=80, num_key_value_heads=8, vocab_size=V),
    "experts": transformers.DeepseekV3Config(vocab_size=V),
    "kinds of layers": transformers.Gemma3TextConfig(vocab_size=V),
    "other names": transformers.GPT2Config(vocab_size=V),
    "a multiple of 4 heads": transformers.CodeGenConfig(vocab_size=V),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_architecture_is_made_small(name: str, tmp_path: Path) -> None:
    CONFIGS[name].save_pretrained(tmp_path / "real")
    family, words = stand_in(
        CausalLM(str(tmp_path / "real"), gradient_checkpointing="auto"), tmp_path / "s", 16, 10**10
    )
    model = family.model(torch.float32)
    assert type(model).__name__ in words and sum(p.numel() for p in model.parameters()) < 30e6
    assert model.get_input_embeddings().weight.shape[0] == V
    assert family.checkpoint(model) == model.supports_gradient_checkpointing  # as of the large one


def test_what_cannot_be_made_small_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="code that comes with a checkpoint"):
        stand_in(CausalLM("x", trust_remote_code=True), tmp_path, 16, None)
    transformers.Mamba2Config().save_pretrained(tmp_path / "real")
    with pytest.raises(UserError, match="it would still have 488 M weights"):
        stand_in(CausalLM(str(tmp_path / "real")), tmp_path / "small", 16, None)


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
    sizes = Sizes(trained=1000, frozen_bytes=8000, whole=False)
    of = {
        "ddp": memory(sizes, Ddp(), 4, True, 8),
        "zero2": memory(sizes, Zero2(), 4, True, 8),
        "stage 1": memory(sizes, Zero2(stage=1), 4, True, 8),
        "zero3": memory(sizes, Zero3(), 4, True, 8),
        "zero3 in fp32": memory(sizes, Zero3(), 4, False, 8),
        "fsdp": memory(sizes, Fsdp(), 4, True, 8),
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
    assert optimizer_bytes(AdamW(), 1e-4) == 8
    assert 2 <= optimizer_bytes(AdamW8bit(), 1e-4) < 2.2


def test_checkpoints_beside_the_free_space(tmp_path: Path) -> None:
    few = checkpoint_words(2**20, 2**20, 3, 10, tmp_path / "not" / "there")
    assert few.startswith("1 MiB each, 4 kept at most: 4 MiB") and "too little" not in few
    assert "10 kept at most" in checkpoint_words(2**50, 2**50, None, 10, tmp_path)
    assert "too little: set train.keep" in checkpoint_words(2**50, 2**50, None, 10, tmp_path)
