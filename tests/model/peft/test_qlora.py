"""Each value of peft=qlora reaches the layers that are built, trains a step, and loads again with peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from mft.errors import UserError
from mft.model.export import save_final
from mft.model.origin import Origin
from mft.model.peft.qlora import QLora
from mft.model.peft.summary import audit
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss
from tests.model.rows import batch, inputs
from tests.model.steps import logits

IDS = torch.arange(2, 42)[None]
KINDS = {
    "nf4": QLora(),
    "fp4": QLora(quant_type="fp4"),
    "single": QLora(double_quant=False),
    "compute_bf16": QLora(compute_dtype="bf16"),
    "storage_fp32": QLora(storage_dtype="fp32"),
    "storage_bf16": QLora(storage_dtype="bf16"),
    "skip": QLora(skip_modules=["o_proj", "layers.1.mlp"]),
    "8_bit": QLora(bits=8),
    "8_bit_skip": QLora(bits=8, skip_modules=["o_proj"]),
}


def load(peft: QLora, tiny: Tiny) -> Any:
    return tiny.model(torch.float32, peft.quantization(torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_loads_onto_a_quantised_base_with_equal_logits(
    kind: str, tiny: Tiny, tokenizer, tmp_path: Path
) -> None:
    peft = KINDS[kind]
    peft.check()
    torch.manual_seed(0)
    model = peft.attach(load(peft, tiny), tiny)
    module = TokenLoss(model, tiny)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        loss = module(*inputs(batch([[20, 9], [30]], 32, 512)))[0].sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0] - 1
    expected = logits(model, IDS)
    save_final(module, tokenizer, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(peft, tiny), tmp_path), IDS), expected)
    origin = Origin.read(tmp_path)  # the same base from the note alone, as mft merge and mft generate load it
    assert torch.equal(logits(PeftModel.from_pretrained(origin.load(), tmp_path), IDS), expected)


def test_four_bit_values_reach_the_layers(tiny: Tiny) -> None:
    def layer(peft: QLora) -> Any:
        return load(peft, tiny).model.layers[0].self_attn.q_proj

    plain = layer(KINDS["nf4"])
    assert type(plain).__name__ == "Linear4bit" and plain.compute_dtype == torch.float32
    assert plain.weight.quant_type == "nf4" and plain.weight.quant_state.nested
    assert plain.weight.dtype == torch.uint8
    assert layer(KINDS["fp4"]).weight.quant_type == "fp4"
    assert not layer(KINDS["single"]).weight.quant_state.nested
    assert layer(KINDS["compute_bf16"]).compute_dtype == torch.bfloat16
    assert layer(KINDS["storage_fp32"]).weight.dtype == torch.float32
    assert layer(KINDS["storage_bf16"]).weight.dtype == torch.bfloat16
    eight = layer(KINDS["8_bit"])
    assert type(eight).__name__ == "Linear8bitLt" and eight.weight.dtype == torch.int8


@pytest.mark.parametrize("bits", [4, 8])
def test_skipped_modules_and_the_head_stay_whole(bits: int, cache_dir: Path) -> None:
    tiny = Tiny(cache_dir=str(cache_dir), tied=False)
    model = load(QLora(bits=bits, skip_modules=["o_proj", "layers.1.mlp"]), tiny)
    whole = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    mlp = {f"model.layers.1.mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")}
    assert whole == {"lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", *mlp}


def test_memory_in_the_audit(tiny: Tiny) -> None:
    def size(peft: QLora) -> int:
        rows = audit(load(peft, tiny))
        return next(row.bytes for row in rows if row.kind.endswith("up_proj"))

    weights = 2 * 128 * 64
    scales = weights // 64  # one for 64 weights
    assert size(KINDS["nf4"]) == weights // 2 + scales + 2 * 4  # in a byte, with one float32 for 256 of them
    assert size(KINDS["single"]) == weights // 2 + 4 * scales
    assert size(KINDS["storage_bf16"]) == size(KINDS["nf4"])
    assert size(KINDS["8_bit"]) == weights


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (QLora(bits=2), r"peft\.bits=2 is not one of 4, 8"),
        (QLora(quant_type="nf5"), r"peft\.quant_type='nf5' is not one of nf4, fp4; did you mean nf4"),
        (
            QLora(compute_dtype="bfloat16"),
            r"peft\.compute_dtype='bfloat16' is not one of null, bf16, fp16, fp32",
        ),
        (
            QLora(storage_dtype="int8"),
            r"peft\.storage_dtype='int8' is not one of null, uint8, .*; did you mean uint8",
        ),
    ],
)
def test_refused_before_loading(peft: QLora, message: str) -> None:
    with pytest.raises(UserError, match=message):
        peft.check()


def test_a_skip_that_matches_nothing_is_refused(tiny: Tiny) -> None:
    peft = QLora(skip_modules=["oproj"])
    with pytest.raises(
        UserError, match=r"peft\.skip_modules: 'oproj' matches no module; .*; did you mean o_proj"
    ):
        peft.attach(load(peft, tiny), tiny)
