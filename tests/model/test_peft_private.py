"""What mft/model/peft_private.py reads is there, and means what it meant in the version it was read in."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

from mft.model import peft_private as private
from mft.model.peft.lora import Lora
from mft.model.tiny import Tiny
from tests.model.mixtures import mixture

GONE = f"in peft {peft.__version__}: see mft/model/peft_private.py, read in {private.READ_IN}"


def test_names_that_peft_takes_for_experts() -> None:
    base = mixture("deepseek_v3")
    assert private.turns_into_experts(base, "up_proj") and not private.turns_into_experts(base, "o_proj"), (
        GONE
    )


def test_new_rows_of_an_output_layer(cache_dir: Path) -> None:
    family = Tiny(cache_dir=str(cache_dir), tied=False, add_tokens=["<new>"])
    base = family.model(torch.float32)
    assert private.new_rows(base.get_output_embeddings()) is None
    model = Lora(rank=2).attach(base, family).get_base_model()
    found = private.new_rows(model.get_output_embeddings())
    assert found is not None, f"the adapter of new rows has other attributes {GONE}"
    layer, rows, weight_RH = found
    assert isinstance(layer, torch.nn.Linear) and weight_RH.shape == (len(rows), 64), GONE
