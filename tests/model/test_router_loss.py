"""The router's auxiliary loss: transformers' own value, computed too where transformers has none, and its
gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.token_loss import TokenLoss
from tests.model.families import LATENT
from tests.model.rows import batch, inputs

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "num_experts_per_tok": 2,
}
DEEPSEEK = LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
WITH_ITS_OWN = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4}),
    "olmoe": ("Olmoe", {"num_experts": 4}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4}),
}
WITHOUT = {
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | {"aux_loss_alpha": 0.001}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | {"aux_loss_alpha": 0.0001}),
    "llama4": ("Llama4Text", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}),
    "glm4_moe": (
        "Glm4Moe",
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
}
DATA = batch([[9], [1], [12], [20]], 22, SIZES["vocab_size"])


def mixture(name: str) -> torch.nn.Module:
    kind, values = (WITH_ITS_OWN | WITHOUT)[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | values))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def router_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights [E, H] whose product with the hidden states are the router's logits."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 2 and p.shape[0] == 4}


def both(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Our router loss at a coefficient of 0.5, the mask of DATA, and what transformers' own forward returns
    for it."""
    router = TokenLoss(model, CausalLM("unused", router_coef=0.5))(*inputs(DATA))[1]
    mask = (DATA.sample_BT >= 0).long()
    outputs = model(input_ids=DATA.ids_BT, attention_mask=mask, output_router_logits=True, use_cache=False)
    return router, mask, outputs


@pytest.mark.parametrize("name", WITH_ITS_OWN)
def test_it_is_the_value_that_transformers_adds(name: str) -> None:
    router, _, outputs = both(mixture(name))
    theirs = outputs.aux_loss
    assert router.item() == pytest.approx(0.5 * theirs.item(), rel=1e-5) and router.item() > 0.4


@pytest.mark.parametrize("name", WITHOUT)
def test_it_is_computed_where_transformers_has_none(name: str) -> None:
    model = mixture(name)
    router, mask, outputs = both(model)
    theirs = load_balancing_loss_func(tuple(outputs.router_logits), 4, model.config.num_experts_per_tok, mask)
    assert router.item() == pytest.approx(0.5 * theirs.item(), rel=1e-5) and router.item() > 0.4


@pytest.mark.parametrize("name", WITH_ITS_OWN | WITHOUT)
def test_its_gradient_reaches_the_router(name: str) -> None:
    model = mixture(name)
    TokenLoss(model, CausalLM("unused", router_coef=0.5))(*inputs(DATA))[1].backward()
    weights = router_weights(model)
    assert weights and all(float(p.grad.abs().max()) > 0 for p in weights.values() if p.grad is not None)
    assert any(p.grad is not None for p in weights.values())


@pytest.mark.parametrize(
    ("name", "expected"), [("mixtral", 0.001), ("llama4", 0.001), ("deepseek_v3", 0.0001)]
)
def test_the_coefficient_is_the_configs_or_the_one_asked_for(name: str, expected: float) -> None:
    model = mixture(name)
    assert TokenLoss(model, CausalLM("unused")).router_coef == expected
    assert TokenLoss(model, CausalLM("unused", router_coef=0.0))(*inputs(DATA))[1].item() == 0
    assert CausalLM("unused", router_coef=0.25).router_weight(model) == 0.25


def test_a_coefficient_without_a_router_or_below_0_is_told() -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    assert CausalLM("unused").router_weight(llama) == 0
    with pytest.raises(UserError, match=r"model\.router_coef=0\.1: LlamaForCausalLM has no router"):
        CausalLM("unused", router_coef=0.1).router_weight(llama)
    with pytest.raises(UserError, match=r"model\.router_coef=-1 must be at least 0, or null"):
        CausalLM("unused", router_coef=-1).check()
