"""Every native family of conf/model, on a tiny random model of its architecture: names are right, it trains, packing
and padding agree with each sample alone, and the loss is transformers' own."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers

from mft.batch import IGNORE
from mft.build import build
from mft.compose import compose_resolved
from mft.model.audit import audit
from mft.model.forward import TokenLoss
from mft.model.peft import Lora
from tests.model.rows import alone, batch, inputs

V = 128
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": V,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DEEPSEEK = LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 16}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "code_llama": ("Llama", {}),
    "deepseek": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | {"q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "gpt_neox": ("GPTNeoX", {}),
    "phi": ("Phi", {"num_key_value_heads": 4}),
    "phi3": ("Phi3", {"sliding_window": 6}),
    "starcoder": ("GPTBigCode", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 128, "n_positions": 256}),
    "starcoder2": ("Starcoder2", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 6}),
    "gemma3": ("Gemma3Text", {"sliding_window": 6}),
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "codegen": ("CodeGen", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 256}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {}),
    "smollm": ("Llama", {}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "llama4": ("Llama4Text", {"num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 128}),
}
OWN_NAMES = ("codegen", "starcoder")  # their configs call sizes otherwise


def tiny_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, values = FAMILIES[name]
    sizes = {k: v for k, v in SIZES.items() if name not in OWN_NAMES or k.endswith("_id") or k == "vocab_size"}
    config = getattr(transformers, f"{kind}Config")(**(sizes | values))
    for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout", "embedding_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    for key in ("resid_dropout", "residual_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    family = build(compose_resolved([f"model={name}", "model.router_coef=null"]).model, "model")
    model = tiny_model(name)
    assert set(family.shard_layers) <= set(model._no_split_modules)
    module = TokenLoss(model, family)
    assert module.per_sample == (name not in ("codegen", "llama4"))
    packed, padded = batch([[9, 1, 12], [20]], 24, V), batch([[9], [1], [12], [20]], 20, V)

    whole = module(*inputs(packed))[0]
    for n, one in enumerate(alone(packed)):
        one.sample_BT.zero_()
        assert torch.allclose(whole[packed.sample_BT == n], module(*inputs(one))[0][0], atol=5e-6)
    nll_BT, router = module(*inputs(padded))
    loss = nll_BT.sum() / (padded.target_BT != IGNORE).sum() + router
    labels = torch.full_like(padded.ids_BT, IGNORE)
    labels[:, 1:] = padded.target_BT[:, :-1]
    adds_it = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")  # for others see test_router
    extra = {"output_router_logits": True} if module.router_coef and adds_it else {}
    mask = (padded.sample_BT >= 0).long()
    theirs = model(input_ids=padded.ids_BT, attention_mask=mask, labels=labels, use_cache=False, **extra).loss
    assert abs(loss.item() - theirs.item() - (0 if adds_it else router.item())) < 5e-6
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    adapted = Lora(rank=4).attach(model, family)
    kinds = {row.kind.rpartition(".")[2] for row in audit(adapted) if row.adapted}
    assert set(family.lora_targets) == kinds
    family.gradient_checkpointing = True
    losses = []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for on in (False, True):
        if on:
            family.checkpoint(adapted)
        loss = TokenLoss(adapted, family)(*inputs(packed))[0].mean()
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-6
    optimizer.step()
    assert TokenLoss(adapted, family)(*inputs(packed))[0].mean().item() < losses[0]
