"""Per-rank memory while a model of 234 MiB is loaded and divided over two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.distributed.ddp import Ddp
from mft.distributed.deepspeed import Zero3
from mft.distributed.fsdp import Fsdp
from mft.model.peft.full import Full
from mft.model.peft.qlora import QLora
from tests.distributed.memory import big_folder, loadings
from tests.distributed.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.long]

CASES = {
    "ddp-full": (Ddp(), Full()),
    "zero3-full": (Zero3(), Full()),
    "fsdp-full": (Fsdp(), Full()),
    "zero3-qlora": (Zero3(), QLora()),
    "fsdp-qlora": (Fsdp(), QLora()),
}
WHOLE = 234.0
"""MiB of the weights."""
UNIT = 16.0
"""MiB of a decoder layer, and of the embedding, the largest weight."""
FOUR_BITS = 44.0
"""MiB of the model with its layers in 4 bits."""

Found = list[dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Found:
    return run_ranks(
        2, loadings, CASES, str(tiny_folder), str(big_folder(tmp_path_factory.mktemp("loading")))
    )


def test_a_rank_takes_its_part_and_a_layer_or_two_while_it_loads(found: Found) -> None:
    for rank in found:
        assert rank["zero3-full"]["load"] < WHOLE / 2 + 3 * UNIT
        # DeepSpeed holds the parameters, a copy that is updated and the gradients, each of them divided
        assert rank["zero3-full"]["prepare"] < 3 * WHOLE / 2 + 3 * UNIT
        assert rank["fsdp-full"]["prepare"] < WHOLE / 2 + 4 * UNIT
        assert rank["ddp-full"]["prepare"] > WHOLE  # what is measured does see whole models


def test_only_one_rank_reads_the_checkpoint(found: Found) -> None:
    for backend in ("zero3-full", "fsdp-full"):
        assert found[0][backend]["read"] > 2 * UNIT  # fsdp lets go of what it has dealt out
        assert found[1][backend]["read"] < UNIT


def test_a_model_is_quantised_weight_by_weight(found: Found) -> None:
    for rank in found:
        for backend in ("zero3-qlora", "fsdp-qlora"):
            assert rank[backend]["load"] < FOUR_BITS + UNIT
            assert rank[backend]["prepare"] < 2 * FOUR_BITS + UNIT < WHOLE / 2
