"""What is trained: full weights, adapters, adapters beside a quantised base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mft.errors import UserError
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss
from tests.model.rows import batch, inputs


def test_precision_decides_the_dtype_of_the_base() -> None:
    assert {p: Full().dtype(p) for p in ("bf16", "fp16", "fp32")} == dict.fromkeys(
        ("bf16", "fp16", "fp32"), torch.float32
    )
    assert [Lora().dtype(p) for p in ("bf16", "fp16", "fp32")] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
    assert (Full().default_lr, Lora().default_lr, QLora().default_lr) == (1e-5, 1e-4, 1e-4)
    assert (
        Full().default_checkpoint_limit
        and Lora().default_checkpoint_limit is None
        and QLora().default_checkpoint_limit is None
    )


def test_adapters_are_float32_on_a_bf16_base(tiny: Tiny) -> None:
    model = Lora().attach(tiny.model(torch.bfloat16), tiny)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("peft", [Full(), Lora(), QLora()], ids=["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trains(tiny: Tiny, peft: Full, precision: str) -> None:
    torch.manual_seed(0)
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    dtype = peft.dtype(precision)
    model = peft.attach(tiny.model(dtype, peft.quantization(compute), compute_dtype=compute), tiny)
    module = TokenLoss(model, tiny)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = batch([[20, 9], [30]], 32, 512)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            nll_BT, _ = module(*inputs(data))
        loss = nll_BT.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.05


def test_evaluating_first_leaves_4_bit_gradients_alone(tiny: Tiny) -> None:
    """bitsandbytes repacks weights at an evaluation on some CPUs, after which gradients were wrong by
    0.73."""
    data = batch([[20, 9], [30]], 32, 512)
    found = []
    for evaluate in (False, True):
        torch.manual_seed(0)
        model = QLora().attach(tiny.model(torch.float32, QLora().quantization(torch.float32)), tiny)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        module = TokenLoss(model, tiny)
        if evaluate:
            module.eval()
            with torch.no_grad():
                module(*inputs(data))
            module.train()
        module(*inputs(data))[0].sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_quantization_settings() -> None:
    config = QLora(quant_type="fp4", double_quant=False).quantization(torch.bfloat16)
    assert config is not None and config.load_in_4bit and config.bnb_4bit_quant_type == "fp4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 and not config.bnb_4bit_use_double_quant
    assert Full().quantization(torch.bfloat16) is None and Lora().quantization(torch.bfloat16) is None


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (Lora(rank=0), "peft.rank=0"),
        (Lora(alpha=0.0), "peft.alpha=0.0"),
        (Lora(dropout=1.0), "peft.dropout=1.0"),
        (Lora(targets="(q"), "not a regular expression"),
        (Lora(targets=[]), "must be a list of module names"),
        (Lora(path="/nowhere/final"), "peft.path=/nowhere/final does not exist"),
        (QLora(quant_type="nf5"), "peft.quant_type='nf5'"),
    ],
)
def test_checks(peft: Lora, message: str) -> None:
    with pytest.raises(UserError, match=message):
        peft.check()


def test_starts_from_an_adapter(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Lora(rank=4, targets=["q_proj"]).attach(tiny.model(torch.float32), tiny)
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    first.save_pretrained(tmp_path)
    again = Lora(path=str(tmp_path))
    again.check()
    second = again.attach(tiny.model(torch.float32), tiny)
    mine = {n: p for n, p in first.named_parameters() if p.requires_grad}
    theirs = {n: p for n, p in second.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert "keeps its own rank=4 (setting: 16)" in caplog.text
