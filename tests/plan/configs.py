"""Folders that hold nothing but the config.json of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig


def config_alone(folder: Path, **shapes: int) -> Path:
    """Writes the config of a llama of 1.1 B weights, with other shapes if given; returns the folder."""
    given: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
    config = LlamaConfig(**(given | shapes), tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.save_pretrained(str(folder))
    return folder
