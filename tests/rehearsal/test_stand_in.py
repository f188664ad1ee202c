"""Small models of real architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from mft.errors import UserError
from mft.model.causal_lm import CausalLM
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
