"""Models with recurrent layers: a row of theirs holds one sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from mft.config.compose import compose_resolved
from mft.config.validate import check
from mft.errors import UserError
from mft.model.attention import described
from mft.model.causal_lm import CausalLM
from mft.model.introspect import recurrent
from mft.model.token_loss import TokenLoss
from tests.model.rows import alone, batch, inputs
from tests.model.test_token_loss import V, small

MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "mamba": ("MambaConfig", {"state_size": 8}),
    "falcon_h1": ("FalconH1Config", MAMBA | {"mamba_d_ssm": 128}),
    "bamba": ("BambaConfig", MAMBA | {"attn_layer_indices": [1]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        LINEAR
        | {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_hold_one_sample(name: str, tmp_path: Path) -> None:
    config, values = MODELS[name]
    model = small(config, **values).eval()
    module = TokenLoss(model, CausalLM("mine", router_coef=None))
    assert module.recurrent and not module.one_row
    padded = batch([[9], [1], [20]], 24, V)
    whole = module(*inputs(padded))[0]
    for n, one in enumerate(alone(padded)):
        assert torch.allclose(whole[padded.sample_BT == n], module(*inputs(one))[0][0], atol=1e-5)
    with pytest.raises(
        UserError, match=r"model\.path=mine: .* carry a state from token to token, .* data=pad"
    ):
        module(*inputs(batch([[9, 14]], 24, V)))

    model.config.save_pretrained(tmp_path)  # and before anything is loaded, where the folder is there
    save_file({}, tmp_path / "model.safetensors")
    tasks = tmp_path / "task"
    tasks.mkdir()
    rows = '{"chat_rounds": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]}\n'
    (tasks / "rows.jsonl").write_text(rows)
    asked = ["model=auto", f"model.path={tmp_path}", f"data.paths=[{tasks}]"]
    with pytest.raises(UserError, match="carry a state from token to token"):
        check(compose_resolved([*asked, "data=pack"]), world=1)
    check(compose_resolved([*asked, "data=pad"]), world=1)


def test_attention_alone_is_not_recurrent() -> None:
    kinds = ["full_attention", "sliding_attention", "chunked_attention"]
    assert not recurrent(json.loads(transformers.Gemma3TextConfig().to_json_string()))
    assert not recurrent({"model_type": "x", "layer_types": kinds})
    assert recurrent({"layer_types": [*kinds, "mamba"]}) == "layers of the kind mamba"


@pytest.mark.parametrize(
    ("config", "values", "said"),
    [
        ("LlamaConfig", {}, "sdpa, sample by sample"),
        ("GptOssConfig", {"num_local_experts": 4}, "eager, sample by sample"),  # its sinks are beyond sdpa
        ("CodeGenConfig", {"n_embd": 64, "n_head": 4, "n_layer": 1, "rotary_dim": 8}, "eager"),
    ],
)
def test_what_computes_the_attention_is_said(config: str, values: dict[str, object], said: str) -> None:
    model = small(config, **values)
    TokenLoss(model, CausalLM("unused"))
    assert described(model, torch.device("cpu"), torch.float32) == said
