"""A tiny random model of every native family, and how far its checks are from exact."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from mft.batch import IGNORE
from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.model.export import save_final
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.peft.summary import audit
from mft.model.tiny import byte_tokenizer
from mft.model.token_loss import TokenLoss
from tests.model.rows import alone, batch, inputs

V = 320
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
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DEEPSEEK = LATENT | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
}
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
    "starcoder": (
        "GPTBigCode",
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 128, "n_positions": 256},
    ),
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
    "llama4": (
        "Llama4Text",
        {"num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 128},
    ),
}
OTHERS: dict[str, tuple[str, dict[str, object]]] = {
    "opt": ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "stablelm": ("StableLm", {}),
    "cohere2": ("Cohere2", {"sliding_window": 6}),
}
"""Some without a yaml, for model=auto."""

OWN_NAMES = ("codegen", "starcoder")  # their configs call sizes otherwise


def tiny_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, values = (FAMILIES | OTHERS)[name]
    sizes = {
        k: v for k, v in SIZES.items() if name not in OWN_NAMES or k.endswith("_id") or k == "vocab_size"
    }
    config = getattr(transformers, f"{kind}Config")(**(sizes | values))
    for key in (
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "attention_dropout",
        "hidden_dropout",
        "embedding_dropout",
    ):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    for key in ("resid_dropout", "residual_dropout", "dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return transformers.AutoModelForCausalLM.from_config(config)


def measure(name: str, folder: Path) -> dict[str, float]:
    """Returns the largest difference of every check of a family, in float32; `folder` holds what it saves on
    the way.

    packed, padded: nll of samples in one row and in rows of their own, to each sample alone; mixed: how far
    it is off where samples see each other; loss: ours to the model's own; checkpointing: of a step's loss; 4
    bits: nll of QLoRA's base to the same weights taken out of 4 bits; saved: of the logits of what save_final
    wrote, read by AutoModelForCausalLM or by peft. full, lora, qlora: what two steps take off the loss, as a
    share of it. Raises AssertionError where a gradient is missing or a name of the yaml is wrong.
    """
    source = folder / "source"
    model = tiny_model(name)
    model.save_pretrained(source)
    tokenizer = byte_tokenizer(V)
    tokenizer.save_pretrained(source)
    overrides = [
        f"model={name if name in FAMILIES else 'auto'}",
        f"model.path={source}",
        "model.router_coef=null",
    ]
    family = build(compose_resolved(overrides).model, "model")
    family.check()
    assert set(family.shard_layers) <= set(model._no_split_modules)
    found: dict[str, float] = {}

    model = family.model(torch.float32)
    module = TokenLoss(model, family)
    packed, padded = batch([[9, 1, 12], [20]], 24, V), batch([[9], [1], [12], [20]], 20, V)
    for kind, rows in (("packed", packed), ("padded", padded)):
        whole = module(*inputs(rows))[0]
        parts = [module(*inputs(one))[0][0] for one in alone(rows)]
        found[kind] = max(largest(whole[rows.sample_BT == n], part) for n, part in enumerate(parts))

    # The same tokens as one sample a row: what the first check would see if samples saw each other.
    joined = batch([[22], [20]], 24, V)
    found["mixed"] = largest(
        module(replace(packed, position_BT=joined.position_BT, sample_BT=joined.sample_BT))[0],
        module(*inputs(packed))[0],
    )

    nll_BT, router = module(*inputs(padded))
    loss = nll_BT.sum() / (padded.target_BT != IGNORE).sum() + router
    labels = torch.full_like(padded.ids_BT, IGNORE)
    labels[:, 1:] = padded.target_BT[:, :-1]
    adds_it = hasattr(
        sys.modules[type(model).__module__], "load_balancing_loss_func"
    )  # for others see test_router
    extra = {"output_router_logits": True} if module.router_coef and adds_it else {}
    mask = (padded.sample_BT >= 0).long()
    theirs = model(input_ids=padded.ids_BT, attention_mask=mask, labels=labels, use_cache=False, **extra).loss
    found["loss"] = abs((loss - theirs - (0 if adds_it else router)).item())
    family.gradient_checkpointing = True

    for kind, peft in (("full", Full()), ("lora", Lora(rank=4)), ("qlora", QLora(rank=4))):
        quantization = peft.quantization(torch.float32)
        base = family.model(torch.float32, quantization)
        if quantization:
            assert any(type(module).__name__ == "Linear4bit" for module in base.modules())
            plain = copy.deepcopy(base).dequantize(torch.float32)
            with torch.no_grad():
                nll = [TokenLoss(m, family)(*inputs(padded))[0] for m in (base, plain)]
            found["4 bits"] = largest(*nll)
        trained = peft.attach(base, family)
        if kind != "full" and family.lora_targets:
            adapted = {row.kind.rpartition(".")[2] for row in audit(trained) if row.adapted}
            assert adapted == set(family.lora_targets), adapted
        module = TokenLoss(trained, family)
        losses = steps(trained, module, packed, family)
        found["checkpointing"] = max(found.get("checkpointing", 0), abs(losses[0] - losses[1]))
        found[kind] = 1 - losses[-1] / losses[0]
        found["saved"] = max(found.get("saved", 0), reloaded(module, folder / kind, tokenizer, padded))
    return found


def steps(model: Any, module: TokenLoss, rows: Any, family: Any) -> list[float]:
    """Returns the loss without and with gradient checkpointing, and after each of two optimizer steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-2 if len(parameters) < len(list(model.parameters())) else 1e-3
    )
    losses = [module(*inputs(rows))[0].mean().item()]
    assert family.checkpoint(model)
    for _ in range(2):
        loss = module(*inputs(rows))[0].mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, module(*inputs(rows))[0].mean().item()]


def reloaded(module: TokenLoss, folder: Path, tokenizer: Any, rows: Any) -> float:
    """Saves a trained model and returns the largest difference of its logits when they are loaded by
    others."""
    from peft import PeftModel

    save_final(module, tokenizer, folder)
    if (folder / "adapter_config.json").exists():
        base = module.family.model(torch.float32, getattr(module.model.config, "quantization_config", None))
        again = PeftModel.from_pretrained(base, str(folder))
    else:
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    again.train(module.model.training)
    ids = rows.ids_BT[3:, :20]
    with torch.no_grad():
        return largest(*(m(input_ids=ids, use_cache=False).logits for m in (module.model, again)))


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the largest absolute difference; NaN where there is one."""
    return (one.float() - other.float()).abs().max().item()
