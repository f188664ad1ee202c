"""Attention sample by sample: what families add to attention, answering as before, ALiBi's slopes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from mft.batch import Batch
from mft.model.attention import ALIBI, FAST, SDPA, alibi_slopes
from mft.model.causal_lm import CausalLM
from mft.model.legacy.native import AlibiConfig
from mft.model.packed_row import PackedRow
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss
from tests.model.families import FAMILIES, tiny_model
from tests.model.rows import batch, inputs
from tests.model.test_token_loss import assert_same, gradients, small

V = 512

FURTHER = {
    "window_by_layer": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "soft_cap_that_bites": ("Gemma2Config", {"sliding_window": 5, "attn_logit_softcapping": 1.0}),
    "chunks": (
        "Llama4TextConfig",
        {"attention_chunk_size": 4, "num_local_experts": 4, "attn_temperature_tuning": False},
    ),
}


def model_of(name: str) -> torch.nn.Module:
    """A tiny model of a family of conf/model, of `FURTHER`, or of the decoder with ALiBi."""
    if name == "alibi":
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": 320,
            "pad_token_id": None,
        }
        config = AlibiConfig(**sizes, num_attention_heads=6, num_key_value_heads=3, no_rope_layers=[0, 0])
        return transformers.AutoModelForCausalLM.from_config(config)
    if name in FURTHER:
        config_class, values = FURTHER[name]
        return small(config_class, vocab_size=320, **values)
    return tiny_model(name)


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER, "alibi"])
def test_packed_equals_the_masked_forms_of_transformers(name: str) -> None:
    """Losses and gradients of rows of several samples, to each sample in a row of its own with transformers'
    mask, and to its block mask of the packed rows. (That of gpt-oss drops the positions, so its samples would
    see each other.) Original formats become glm, qwen2, llama and the decoder with ALiBi."""
    model = model_of(name)
    module = TokenLoss(model, CausalLM("unused"))
    assert module.per_sample == (name not in ("codegen", "llama4"))
    packed, padded = (
        batch([[9, 1, 14], [5, 20, 3]], 32, 320),
        batch([[9], [1], [14], [5], [20], [3]], 20, 320),
    )
    forms = [(module.per_sample, packed), (False, padded), *([] if name == "gpt_oss" else [(False, packed)])]
    found = []
    for per_sample, data in forms:
        module.per_sample = module.one_row = per_sample
        model.zero_grad()
        nll_BT, _ = module(*inputs(data))
        nll_BT.sum().backward()
        found.append((nll_BT[data.sample_BT >= 0].detach(), gradients(model)))
    for losses, slopes in found[1:]:
        assert torch.allclose(found[0][0], losses, atol=2e-6)
        assert_same(found[0][1], slopes, 1e-5)


def test_no_mask_of_the_row_is_made(tiny: Tiny) -> None:
    module = TokenLoss(tiny.model(torch.float32), tiny)
    longest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal longest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() >= 2 and out.shape[-1] == out.shape[-2] != 64:
                longest = max(longest, out.shape[-1])
            return out

    with Watch():
        module(*inputs(batch([[40, 30, 20], [70, 20]], 90, V)))[0].sum().backward()
    assert longest <= 70


DROPOUT = {"llama": "attention_dropout", "mistral": "attention_dropout", "gemma2": "attention_dropout"}
DROPOUT |= {"gpt_oss": "attention_dropout", "starcoder": "attn_pdrop", "alibi": "attention_dropout"}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_of_attention_is_kept(name: str) -> None:
    """It is drawn anew in training, gone in evaluation, and lets no sample see another."""
    config = model_of(name).config
    setattr(config, DROPOUT[name], 0.5)
    torch.manual_seed(0)
    module = TokenLoss(transformers.AutoModelForCausalLM.from_config(config), CausalLM("unused"))
    module.train()
    assert module.per_sample
    data = batch([[9, 14]], 24, 320)
    other = batch([[9, 14]], 24, 320)
    other.ids_BT[:, :9] = 7  # another first sample

    def drawn(seed: int, of: Batch) -> torch.Tensor:
        torch.manual_seed(seed)
        return module(*inputs(of))[0].detach()

    first, again, second = drawn(1, data), drawn(1, data), drawn(2, data)
    assert torch.equal(first, again) and not torch.allclose(first, second, atol=1e-4)
    assert torch.equal(first[data.sample_BT == 1], drawn(1, other)[data.sample_BT == 1])
    module.eval()
    assert torch.equal(drawn(1, data), drawn(2, data))


@pytest.mark.parametrize("name", [FAST, SDPA, ALIBI])
def test_dropout_keeps_the_mean(name: str) -> None:
    """What attention mixes is linear in its weights, so dropout leaves its mean as it is: 1,000 draws, 6
    standard errors of the mean."""
    attend = transformers.AttentionInterface()[name]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 7, 8) for _ in range(3))
    module = SimpleNamespace(config=SimpleNamespace(), layer_idx=0, is_causal=True, training=True)
    row = {"packed_row": PackedRow.of([3, 4], query.device), "scaling": 0.3}
    plain = attend(module, query, key, value, None, dropout=0.0, **row)[0]
    draws = torch.stack([attend(module, query, key, value, None, dropout=0.3, **row)[0] for _ in range(1000)])
    error = draws.std(0) / 1000**0.5
    assert ((draws.mean(0) - plain).abs() <= 6 * error + 1e-6).all() and draws.std(0).max() > 0.1


def test_answering_is_ordinary_attention(tiny: Tiny) -> None:
    ordinary, trained = tiny.model(torch.float32).eval(), tiny.model(torch.float32)
    assert TokenLoss(trained, tiny).per_sample and trained.config._attn_implementation == FAST
    trained.eval()
    ids = torch.randint(2, V, (2, 9))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    for arguments in ({}, {"attention_mask": mask}, {"attention_mask": mask, "use_cache": False}):
        assert torch.equal(
            trained(input_ids=ids, **arguments).logits, ordinary(input_ids=ids, **arguments).logits
        )
    answers = [
        m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (ordinary, trained)
    ]
    assert torch.equal(*answers)


def test_what_stays_masked() -> None:
    codegen = transformers.AutoModelForCausalLM.from_config(
        transformers.CodeGenConfig(n_embd=64, n_head=4, n_layer=1, rotary_dim=8, vocab_size=V)
    )
    assert not TokenLoss(codegen, CausalLM("unused")).per_sample
    tuned = small("Llama4TextConfig", num_local_experts=4, attn_temperature_tuning=True)
    assert not TokenLoss(tuned, CausalLM("unused")).per_sample


def test_sdpa_alone_where_it_is_asked_for(tiny: Tiny) -> None:
    asked = replace(tiny, attention="sdpa")
    model = asked.model(torch.float32)
    assert TokenLoss(model, asked).per_sample and model.config._attn_implementation == SDPA


def test_alibi_slopes() -> None:
    cpu = torch.device("cpu")
    assert alibi_slopes(4, cpu).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6, cpu).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert alibi_slopes(6, cpu) is alibi_slopes(6, cpu)  # no copy to the device in every layer
    assert ALIBI in transformers.AttentionInterface()
