"""The table of what is trained and what is frozen."""

from __future__ import annotations

import io
from dataclasses import replace

import torch
from rich.console import Console

from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.peft.summary import AuditRow, as_json, notes, table, trainable_share
from mft.model.tiny import Tiny
from tests.model.mixtures import family_of, mixture


def test_audit_counts(tiny: Tiny) -> None:
    rows = Lora(rank=4, targets=["q_proj", "down_proj"]).audit(
        Lora(rank=4, targets=["q_proj", "down_proj"]).attach(tiny.model(torch.float32), tiny)
    )
    by_kind = {row.kind: row for row in rows}
    # q_proj 64×64, rank 4: A 4×64 and B 64×4 in each of two layers; down_proj 64×128
    kind = "model.layers.*.self_attn.q_proj"
    assert by_kind[kind] == AuditRow(kind, 2, 2, 1024, 9216, bytes=4 * 9216)
    kind = "model.layers.*.mlp.down_proj"
    assert by_kind[kind] == AuditRow(kind, 2, 2, 1536, 17920, bytes=4 * 17920)
    assert by_kind["model.layers.*.mlp.up_proj"].adapted == 0
    assert next(iter(by_kind)) == "model.embed_tokens"
    console = Console(file=io.StringIO(), width=120)
    console.print(table(rows))
    text = console.file.getvalue()
    assert "trained: 2,560 of" in text and "layers.*.self_attn.q_proj" in text
    assert (
        as_json(rows)["modules"]["lm_head" if "lm_head" in by_kind else "model.embed_tokens"]["adapted"] == 0
    )


def test_audit_counts_4_bit_weights_in_full(tiny: Tiny) -> None:
    plain = Lora().audit(Lora().attach(tiny.model(torch.float32), tiny))
    quantised = QLora().audit(
        QLora().attach(tiny.model(torch.float32, QLora().quantization(torch.float32)), tiny)
    )
    assert [replace(row, bytes=0, packed=False) for row in quantised] == [
        replace(row, bytes=0) for row in plain
    ]
    q_proj = next(row for row in quantised if row.kind.endswith("q_proj"))
    # two layers of 64 x 64 weights in half a byte each, a scale byte for 64 of them with a float32 for 256
    # scales, and the float32 adapters
    assert q_proj.packed and q_proj.bytes == 2 * (64 * 64 // 2 + 64 + 4) + 4 * q_proj.trainable
    full = Full().audit(Full().attach(tiny.model(torch.float32), tiny))
    assert trainable_share(full) == 1 and all(row.adapted == row.total for row in full)


def test_names_are_whole_in_80_columns() -> None:
    large = AuditRow(
        "model.layers.*.mlp.experts.gate_up_proj", 0, 48, 0, 19_327_352_832, "experts", 128, 38_654_705_664
    )
    rows = [*Lora(rank=2).audit(Lora(rank=2).attach(mixture("deepseek_v3"), family_of("deepseek_v3"))), large]
    text = io.StringIO()
    Console(file=text, width=80).print(table(rows))
    lines = text.getvalue().splitlines()
    printed = [line.split() for line in lines]
    assert max(map(len, lines)) <= 80 and {row.kind.removeprefix("model.") for row in rows} <= {
        p[0] for p in printed if p
    }
    assert [
        "layers.*.mlp.experts.gate_up_proj",
        "0",
        "of",
        "48",
        "x",
        "128",
        "0",
        "19.3B",
        "0%",
        "36.00",
    ] in printed


def test_experts_and_router_are_named_in_sentences() -> None:
    frozen = Lora(rank=2).audit(Lora(rank=2).attach(mixture("qwen3_moe"), family_of("qwen3_moe")))
    assert notes(frozen) == [
        "experts: 0 of 4 adapted (in each of 2 layers); peft.experts=true adapts them",
        "router: 0 of 2 adapted",
    ]
    text = io.StringIO()
    Console(file=text, width=140).print(table(frozen))
    assert "0 of 2 x 4 " in text.getvalue() and "experts: 0 of 4 adapted" in text.getvalue()
    peft = Lora(rank=2, experts=True, router=True)
    rows = peft.audit(peft.attach(mixture("qwen3_moe"), family_of("qwen3_moe")))
    assert notes(rows) == ["experts: 4 of 4 adapted (in each of 2 layers)", "router: 2 of 2 adapted"]
    by_kind = {row.kind: row for row in rows}
    # gate_up: 4 experts of 128 x 64, rank 2, two layers
    assert by_kind["model.layers.*.mlp.experts.gate_up_proj"].trainable == 2 * 4 * 2 * (128 + 64)
    assert by_kind["model.layers.*.mlp.gate"].trainable == 2 * 2 * (4 + 64)
    assert sum(row.parameters - row.trainable for row in rows) == sum(
        p.numel() for p in mixture("qwen3_moe").parameters()
    )
    assert notes(Full().audit(Full().attach(mixture("qwen3_moe"), family_of("qwen3_moe"))))[0].startswith(
        "experts: 4 of 4"
    )
