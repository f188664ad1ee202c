"""Tiny random mixtures of experts of every family that has them, as models and as checkpoint folders."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from mft.model.family import CausalLM

LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK = LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
DEEPSEEK |= {"first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 16}
MIXTURES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | {"q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": ("Llama4Text", {"num_local_experts": 2, "intermediate_size_mlp": 128}),
}
"""The seven families: class and what differs from SIZES; 4-bit weights want widths in multiples of 64."""

SIZES: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def mixture(name: str) -> torch.nn.Module:
    """Returns the random model of a family, the same at every call."""
    kind, values = MIXTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | values))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def mixture_folder(name: str, folder: Path, tokenizer) -> Path:
    """Writes the model of a family with a tokenizer, once; returns the folder."""
    if not folder.exists():
        mixture(name).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def family_of(name: str) -> CausalLM:
    """Returns the choice model=<name>, whatever its path."""
    from mft.build import build
    from mft.compose import compose_resolved

    built: CausalLM = build(compose_resolved([f"model={name}"]).model, "model")
    return built
