"""Attention sample by sample: what families add to attention, answering as before, ALiBi's slopes."""

from __future__ import annotations

import pytest
import torch
import transformers

from mft.model.attention import ALIBI, SDPA, alibi_slopes, row_of_samples
from mft.model.family import CausalLM
from mft.model.forward import TokenLoss
from mft.model.tiny import Tiny
from tests.model.rows import batch, inputs
from tests.model.test_forward import assert_same, gradients, small

V = 512

ADDITIONS = {
    "plain": ("LlamaConfig", {}),
    "window": ("MistralConfig", {"sliding_window": 5}),
    "window_by_layer": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "window_and_soft_cap": ("Gemma2Config", {"sliding_window": 5, "attn_logit_softcapping": 1.0}),
    "window_and_sinks": ("GptOssConfig", {"sliding_window": 5, "num_local_experts": 4}),
    "chunks": (
        "Llama4TextConfig",
        {"attention_chunk_size": 4, "num_local_experts": 4, "attn_temperature_tuning": False},
    ),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_packed_equals_transformers_on_one_sample_a_row(name: str) -> None:
    config, values = ADDITIONS[name]
    model = small(config, **values)
    module = TokenLoss(model, CausalLM("unused"))
    assert module.per_sample
    packed, padded = batch([[9, 1, 14], [5, 20, 3]], 32, V), batch([[9], [1], [14], [5], [20], [3]], 20, V)
    found = []
    for per_sample, data in ((True, packed), (False, padded)):
        module.per_sample = module.one_row = per_sample
        model.zero_grad()
        nll_BT, _ = module(*inputs(data))
        nll_BT.sum().backward()
        found.append((nll_BT[data.sample_BT >= 0].detach(), gradients(model)))
    assert torch.allclose(found[0][0], found[1][0], atol=2e-6)
    assert_same(found[0][1], found[1][1], 1e-5)


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


def test_dropout_of_attention_is_kept() -> None:
    model = small("LlamaConfig", attention_dropout=0.5)
    module = TokenLoss(model, CausalLM("unused"))
    data = batch([[9, 14]], 24, V)
    drawn = [module(*inputs(data))[0].sum().item() for _ in range(2)]
    module.eval()
    plain = [module(*inputs(data))[0].sum().item() for _ in range(2)]
    assert drawn[0] != drawn[1] and plain[0] == plain[1]


def test_answering_is_ordinary_attention(tiny: Tiny) -> None:
    ordinary, trained = tiny.model(torch.float32).eval(), tiny.model(torch.float32)
    assert TokenLoss(trained, tiny).per_sample and trained.config._attn_implementation == SDPA
    trained.eval()
    ids = torch.randint(2, V, (2, 9))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    for arguments in ({}, {"attention_mask": mask}, {"attention_mask": mask, "use_cache": False}):
        assert torch.equal(trained(input_ids=ids, **arguments).logits, ordinary(input_ids=ids, **arguments).logits)
    answers = [m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (ordinary, trained)]
    assert torch.equal(*answers)


def test_what_stays_masked() -> None:
    codegen = transformers.AutoModelForCausalLM.from_config(
        transformers.CodeGenConfig(n_embd=64, n_head=4, n_layer=1, rotary_dim=8, vocab_size=V)
    )
    assert not TokenLoss(codegen, CausalLM("unused")).per_sample
    tuned = small("Llama4TextConfig", num_local_experts=4, attn_temperature_tuning=True)
    assert not TokenLoss(tuned, CausalLM("unused")).per_sample


def test_row_of_samples() -> None:
    found = row_of_samples(torch.tensor([0, 1, 2, 0, 0, 1]))
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 4, 6] and found["max_length_q"] == 3


def test_alibi_slopes() -> None:
    assert alibi_slopes(4).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert ALIBI in transformers.AttentionInterface()
