"""Tiny random mixtures of experts of every family that has them, as models and as checkpoint folders."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from mft.model.causal_lm import CausalLM
from tests.model.families import FAMILIES, SIZES

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4")
OTHERWISE: dict[str, object] = {
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "eos_token_id": 0,
}
"""How they differ from tests.model.families: they take the tiny tokenizer's tokens."""


def mixture(name: str) -> torch.nn.Module:
    """Returns the random model of a family, the same at every call."""
    kind, values = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | values | OTHERWISE))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def mixture_folder(name: str, folder: Path, tokenizer) -> Path:
    """Writes the model of a family with a tokenizer, once; returns the folder."""
    if not folder.exists():
        mixture(name).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def family_of(name: str) -> CausalLM:
    """Returns the choice model=<name>, whatever its path."""
    from mft.config.build import build
    from mft.config.compose import compose_resolved

    built: CausalLM = build(compose_resolved([f"model={name}"]).model, "model")
    return built
