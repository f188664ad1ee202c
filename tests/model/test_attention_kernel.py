"""Which attention is taken. There is no GPU and no flash-attn where this was written: the machine is a
stand-in, its facts are given; everything that is decided from them is the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.config.validate import check
from mft.errors import UserError
from mft.model.attention import ALIBI
from mft.model.attention_kernel import Facts, unavailable_reason
from mft.model.causal_lm import CausalLM
from tests.model import originals
from tests.model.families import FAMILIES

AMPERE = Facts((2, 8), gpus=8, capability=(8, 0))
WITHOUT = {"codegen", "gpt_oss", "llama4"}
"""Families whose attention flash attention 2 does not compute: one of its own, sinks, 4-D masks."""


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Facts, "here", lambda: AMPERE)


@pytest.mark.parametrize(
    ("facts", "dtype", "why"),
    [
        (AMPERE, "torch.bfloat16", ""),
        (AMPERE, "fp16", ""),
        (Facts((2, 6), 1, (9, 0)), "torch.float16", ""),
        (Facts(None, 1, (8, 0)), "bf16", "the package flash-attn is not installed"),
        (Facts((2, 5), 1, (8, 0)), "bf16", "flash-attn is of version 2.5; 2.6 or newer is needed"),
        (Facts((2, 8)), "bf16", "there is no CUDA device"),
        (Facts((2, 8), 2, (7, 5)), "bf16", "the GPU has compute capability 7.5; 8.0 or higher is needed"),
        (AMPERE, "torch.float32", "it has no kernel for float32; train in bf16 or fp16"),
    ],
)
def test_what_the_machine_lacks(facts: Facts, dtype: str, why: str) -> None:
    assert unavailable_reason(facts, dtype) == why


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("name", FAMILIES)
def test_auto_takes_flash_attention_where_the_family_can(name: str, tmp_path: Path) -> None:
    getattr(transformers, f"{FAMILIES[name][0]}Config")().save_pretrained(tmp_path)
    family = build(compose_resolved([f"model={name}", f"model.path={tmp_path}"]).model, "model")
    expected = "sdpa" if name in WITHOUT else "flash_attention_2"
    assert family.attention_for(torch.bfloat16) == family.attention_for(torch.float16) == expected
    assert family.attention_for(torch.float32) == "sdpa"
    family.attention = "flash_attention_2"
    with pytest.raises(UserError, match="cannot run here: it has no kernel for float32"):
        family.attention_for(torch.float32)
    if name in WITHOUT:
        with pytest.raises(UserError, match=r"cannot run here: \w+ForCausalLM (does not|adds to)"):
            family.attention_for(torch.bfloat16)


@pytest.mark.usefixtures("ampere")
def test_original_formats() -> None:
    flash = "flash_attention_2"
    for name, expected in (("qwen", flash), ("baichuan2_7b", flash), ("baichuan_13b", ALIBI)):
        overrides = [f"model={name}", f"model.path={originals.FIXTURES / name}"]
        family = build(compose_resolved(overrides).model, "model")
        assert family.attention_for(torch.bfloat16) == expected
    family.attention = flash
    with pytest.raises(UserError, match="cannot compute ALiBi"):
        family.attention_for(torch.bfloat16)


@pytest.mark.usefixtures("ampere")
def test_refused_before_a_run_starts(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    rows = '{"chat_rounds": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]}\n'
    (tmp_path / "task" / "rows.jsonl").write_text(rows)
    asked = ["model=auto", f"model.path={tiny_folder}", f"data.paths=[{tmp_path / 'task'}]"]
    asked += ["model.attention=flash_attention_2"]
    with pytest.raises(UserError, match="cannot run here: it has no kernel for fp32"):
        check(compose_resolved([*asked, "train.precision=fp32"]), world=1)
    check(compose_resolved([*asked, "train.precision=bf16"]), world=1)


def test_this_machine_is_asked(tiny_folder: Path) -> None:
    """Where the package is missing, as here, its facts are those of a machine without flash attention."""
    facts = Facts.here()
    taken = CausalLM(str(tiny_folder)).attention_for(torch.bfloat16)
    assert (taken == "flash_attention_2") == (not unavailable_reason(facts))
