"""FLOPs of a token: by hand for a tiny model, and the same however its weights are held."""

from __future__ import annotations

import os

import pytest
import torch

from mft.distributed.ddp import Single
from mft.model.causal_lm import CausalLM
from mft.model.flops import TokenFlops, token_flops
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.tiny import Tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engines import backend
from tests.selection import long

PEFTS = {
    "full": Full(),
    "lora": Lora(),
    "qlora": QLora(),
    "qlora stored as bf16": QLora(storage_dtype="bf16"),
    "qlora of 8 bits": QLora(bits=8),
}


def counted(name: str, family: Tiny, peft: Full, every: int = 0) -> TokenFlops:
    """Counts a model as a run does: loaded by its engine, prepared by none."""
    engine = Single().start("fp32", cpu=True) if name == "single" else backend(name).start("fp32", cpu=True)
    with engine.loading():
        base = family.model(torch.float32, peft.quantization(torch.float32))
    model = peft.attach(base, family)
    flops = token_flops(model, family.layer_classes(model), every)
    engine.close()
    return flops


def table(names: list[str], cache_dir: str) -> dict[tuple[str, str], tuple[float, float, float]]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    family = Tiny(cache_dir=cache_dir)
    found = {(name, kind): counted(name, family, peft, 1) for name in names for kind, peft in PEFTS.items()}
    return {key: (flops.trained, flops.frozen, flops.recomputed) for key, flops in found.items()}


def test_by_hand(tiny: Tiny) -> None:
    config = tiny.config()
    h, ff, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    groups = config.num_key_value_heads / config.num_attention_heads
    layer = h * h * (2 + 2 * groups) + 3 * h * ff
    matrices = layers * layer + h * config.vocab_size  # the head; the embedding is looked up, or is the head
    assert counted("single", tiny, Full()) == TokenFlops(6 * matrices, 0.0)
    assert counted("single", tiny, Full(), every=1).recomputed == 2 * layers * layer
    assert counted("single", tiny, Full(), every=layers).recomputed == 2 * layer
    adapters = 16 * layers * (2 * (2 * h) + 2 * (h + h * groups) + 3 * (h + ff))
    assert counted("single", tiny, Lora()) == TokenFlops(6 * adapters, 4 * matrices)


def test_of_routed_experts_those_count_that_a_token_goes_to() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    config = MixtralConfig(**sizes, tie_word_embeddings=False)
    model = MixtralForCausalLM(config)
    matrices = 4 * 32 * 32 + 8 * 32 + 2 * 3 * 32 * 48 + 64 * 32
    assert token_flops(model, ["MixtralDecoderLayer"], 0).model == 6 * matrices
    peft = Lora(rank=4, experts=True, router=True)
    adapted = token_flops(peft.attach(model, CausalLM("x")), ["MixtralDecoderLayer"], 0)
    of_layers = 4 * (4 * 2 * 32 + 32 + 8)  # of attention and the router
    of_experts = 4 * 2 * (32 + 2 * 48 + 48 + 32)  # of the two matrices of each of two experts
    assert adapted == TokenFlops(6 * (of_layers + of_experts), 4 * matrices)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("backends", [["zero3", "fsdp"], long(["ddp", "zero2"])], ids="-".join)
def test_all_ways_to_hold_a_model_count_alike(backends: list[str], cache_dir) -> None:
    single = table(["single"], str(cache_dir))
    for rank in run_ranks(2, table, backends, str(cache_dir)):
        assert rank == {(name, kind): single["single", kind] for name, kind in rank}
    full, adapters = single["single", "full"], {single["single", kind] for kind in PEFTS if kind != "full"}
    ((trained, frozen, recomputed),) = adapters
    assert full[0] == pytest.approx(frozen * 6 / 4) and full[1] == 0
    assert recomputed == pytest.approx(full[2] + trained / 3)  # the adapters of a layer are made again, too
