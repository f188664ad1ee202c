"""Causal LMs of transformers that have no yaml: model=auto trains them, or says why not."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers

from mft.batch import IGNORE
from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.introspect import recurrent
from mft.model.peft.lora import Lora
from mft.model.peft.summary import audit
from mft.model.token_loss import TokenLoss
from tests.model.rows import alone, batch, inputs
from tests.model.test_token_loss import V, small

AUTO = CausalLM("mine")


HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
SEE_OTHERS: dict[str, dict[str, object]] = {
    "Falcon": HEADS | {"hidden_size": 64},
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
    "XGLM": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128, "dropout": 0.0},
}


@pytest.mark.parametrize("name", SEE_OTHERS)
def test_samples_that_would_see_each_other_are_refused_in_one_row(name: str) -> None:
    """These classes of transformers say nothing of it; the first forward tries it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=V, **SEE_OTHERS[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.train()
    module = TokenLoss(model, AUTO)
    padded = batch([[9], [20]], 24, V)
    whole = module(*inputs(padded))[0]
    assert model.training and not module.apart
    model.eval()
    for n, one in enumerate(alone(padded)):
        assert torch.allclose(
            module(*inputs(padded))[0][padded.sample_BT == n], module(*inputs(one))[0][0], atol=1e-5
        )
    assert whole.requires_grad
    with pytest.raises(UserError, match=r"model\.path=mine: \w+ lets the samples of one row see"):
        module(*inputs(batch([[9, 14]], 24, V)))


def test_all_linear_leaves_out_what_mambas_kernels_read() -> None:
    def model() -> torch.nn.Module:
        return small("MambaConfig", state_size=8)

    rows = audit(Lora(rank=2, targets="all-linear").attach(model(), AUTO))
    adapted = {row.kind.rpartition(".")[2] for row in rows if row.adapted}
    assert adapted & {"in_proj", "x_proj", "dt_proj", "out_proj"} == {"in_proj", "x_proj"}
    for name in ("out_proj", "dt_proj"):
        refused = rf"mixer\.{name} cannot have an adapter: kernels of mamba read it"
        with pytest.raises(UserError, match=refused):
            Lora(targets=[name]).attach(model(), AUTO)


def test_gradient_checkpointing_that_a_class_cannot_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("JetMoeConfig", num_local_experts=4, num_experts_per_tok=2, kv_channels=16)
    with pytest.raises(
        UserError, match=r"gradient_checkpointing=true: JetMoeForCausalLM does not support it"
    ):
        CausalLM("mine", gradient_checkpointing=True).checkpoint(model)
    monkeypatch.setattr("mft.model.causal_lm.CHECKPOINTING_ABOVE", 1000)
    with caplog.at_level(logging.WARNING):
        assert not AUTO.checkpoint(model)
    assert "gradient_checkpointing=auto is off: JetMoeForCausalLM does not support it" in caplog.text


def test_a_class_with_experts_whose_config_has_none_has_no_router_loss() -> None:
    model = small("DogeConfig", is_moe=False)
    nll_BT, router = TokenLoss(model, AUTO)(*inputs(batch([[9, 14]], 24, V)))
    assert router == 0 and nll_BT.sum() > 0


def test_settings_of_a_model_that_also_sees_are_those_of_its_text_part() -> None:
    """Gemma 4 caps its logits by a value of text_config; without it the loss would be another one."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "vocab_size": V,
        "pad_token_id": 0,
    }
    text |= {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 2.0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert not hasattr(config, "final_logit_softcapping")
    data = batch([[19], [24]], 24, V)
    ours = TokenLoss(model, AUTO)(*inputs(data))[0].sum() / (data.target_BT != IGNORE).sum()
    labels = torch.full_like(data.ids_BT, IGNORE)
    labels[:, 1:] = data.target_BT[:, :-1]
    mask, pictures = (data.sample_BT >= 0).long(), torch.zeros_like(data.ids_BT)
    theirs = model(input_ids=data.ids_BT, attention_mask=mask, labels=labels, mm_token_type_ids=pictures).loss
    assert abs(ours.item() - theirs.item()) < 2e-6
    assert (
        recurrent({"text_config": {"layer_types": ["linear_attention"]}})
        == "layers of the kind linear_attention"
    )
