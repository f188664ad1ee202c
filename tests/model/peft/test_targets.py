"""Adapters sit where the settings say: the family's names, a list, a regular expression, all linear
layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mft.errors import UserError
from mft.model.peft.lora import Lora
from mft.model.tiny import Tiny


def adapted(model: torch.nn.Module) -> set[str]:
    return {row.kind.rpartition(".")[2] for row in Lora().audit(model) if row.trainable}


def test_targets(tiny: Tiny, tiny_folder: Path) -> None:
    from mft.model.causal_lm import CausalLM

    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    listed = CausalLM(str(tiny_folder), lora_targets=["q_proj", "o_proj"])
    for family, targets, expected in (
        (tiny, None, every),
        (listed, None, {"q_proj", "o_proj"}),
        (listed, "all-linear", every),
        (listed, ["down_proj"], {"down_proj"}),
        (listed, r".*\.0\.mlp\.(up|gate)_proj", {"up_proj", "gate_proj"}),
    ):
        assert adapted(Lora(targets=targets).attach(family.model(torch.float32), family)) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "qproj"],
            "the name 'qproj' matches no module; this model has embed_tokens, q_proj, .*; did you mean "
            "q_proj",
        ),
        (["c_attn"], r"the name 'c_attn' matches no module; this model has embed_tokens.*lm_head$"),
        (r".*\.attn\..*", "the regular expression .* matches no module"),
        ("q_proj", r"regular expression 'q_proj' matches no module.*a single name needs brackets"),
    ],
)
def test_unmatched_targets(tiny: Tiny, targets: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lora(targets=targets).attach(tiny.model(torch.float32), tiny)
