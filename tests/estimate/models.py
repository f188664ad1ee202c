"""Models of random weights of several families, wide enough that a step's memory is not all small change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTHS = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_hidden_layers": 5, "intermediate_size": 1024}),
    "qwen3": ("Qwen3Config", {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 1024}),
    "phi3": ("Phi3Config", {"num_hidden_layers": 8}),
    "gemma2": ("Gemma2Config", {"tie_word_embeddings": True, "sliding_window": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_hidden_layers": 4}),
    "gemma": ("GemmaConfig", {"tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_hidden_layers": 4},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 512,
            "num_hidden_layers": 4,
        },
    ),
    "mamba": ("MambaConfig", {"state_size": 8}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "olmo2": ("Olmo2Config", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256, "num_hidden_layers": 4},
    ),
    "granite": ("GraniteConfig", {}),
}
"""Name → transformers' class of its config, and values that differ from WIDTHS."""


def made(name: str, root: Path) -> Path:
    """Returns the checkpoint folder of a family under `root`, made if it is not there."""
    import torch
    import transformers

    folder = root / name
    if not (folder / "model.safetensors").exists():
        kind, values = FAMILIES[name]
        config = getattr(transformers, kind)(**(WIDTHS | values))
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
