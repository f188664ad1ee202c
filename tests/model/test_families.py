"""Every native family of conf/model, on a tiny random model of its architecture: names are right, it trains
with every weight, with LoRA and on 4 bits, packing and padding agree with each sample alone, the loss is
transformers' own, and what is saved is what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.config.overrides import group_options
from mft.config.schema import config_dir
from mft.model.token_loss import TokenLoss
from tests.model.families import FAMILIES, OTHERS, measure, tiny_model

EXACT = {"packed": 5e-6, "padded": 5e-6, "loss": 5e-6, "checkpointing": 1e-6, "4 bits": 5e-6, "saved": 5e-6}


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_family(name: str, tmp_path: Path) -> None:
    """OTHERS: models without a yaml, of which a few of different kinds are held to the same."""
    found = measure(name, tmp_path)
    assert {check: found[check] for check in EXACT if not found[check] < EXACT[check]} == {}
    assert all(found[peft] > 0 for peft in ("full", "lora", "qlora"))
    assert found["mixed"] > 100 * EXACT["packed"]
    assert found.keys() == {*EXACT, "mixed", "full", "lora", "qlora"}


def test_every_family_is_held_to_this() -> None:
    """The others: original formats (test_legacy), any folder, and the models made here."""
    native = {n for n in group_options("model") if target(n) == "mft.model.causal_lm.CausalLM"}
    assert native - {"auto", "demo"} == set(FAMILIES)


def target(name: str) -> str:
    """Returns the class of a yaml, or of those that it is made of."""
    values = yaml.safe_load((config_dir() / "model" / f"{name}.yaml").read_text())
    bases = [base for base in values.get("defaults", ()) if base != "_self_"]
    return values.get("_target_") or next(target(base) for base in reversed(bases))


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_goes_sample_by_sample(name: str) -> None:
    family = build(compose_resolved([f"model={name}", "model.router_coef=null"]).model, "model")
    with torch.device("meta"):
        module = TokenLoss(tiny_model(name), family)
    assert module.per_sample == (name not in ("codegen", "llama4"))
