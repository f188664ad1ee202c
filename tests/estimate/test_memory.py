"""What a rank needs of memory, by part, counted on real models."""

from __future__ import annotations

import math

import pytest

from mft.estimate import memory
from mft.model.meta_model import skeleton
from mft.model.peft.full import Full, compute_dtype
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.peft.summary import total_of
from mft.model.tiny import Tiny
from mft.optim.optimizers import AdamW, AdamW8bit


@pytest.mark.parametrize(
    "peft", [Full(), Lora(use_dora=True), QLora(), QLora(bits=8), QLora(double_quant=False)]
)
def test_a_model_without_weights_counts_the_bytes_of_a_loaded_one(peft: Full, tiny: Tiny) -> None:
    computing = compute_dtype("bf16")
    quantization, dtype = peft.quantization(computing), peft.dtype("bf16")
    loaded = peft.audit(peft.attach(tiny.model(dtype, quantization, compute_dtype=computing), tiny))
    meta = peft.attach(skeleton(tiny.config(), quantization, dtype), tiny)
    computed = peft.audit(meta)
    for field in ("parameters", "trainable", "adapted"):
        assert total_of(computed, field) == total_of(loaded, field)
    # the small constants of double quantisation are not counted
    assert total_of(computed, "bytes") == pytest.approx(total_of(loaded, "bytes"), rel=0.03)


def test_states_of_an_optimizer_are_measured() -> None:
    assert memory.optimizer_bytes(AdamW(), 1e-4) == 8
    assert 2 <= memory.optimizer_bytes(AdamW8bit(), 1e-4) < 2.2


@pytest.mark.parametrize("bits", [4, 8])
def test_a_skeleton_has_the_adapters_of_a_run(bits: int, tiny: Tiny) -> None:
    """peft has classes of its own for quantised layers, which keep other activations."""
    peft = QLora(bits=bits)
    model = peft.attach(skeleton(tiny.config(), peft.quantization(compute_dtype("bf16"))), tiny)
    adapted = {type(part).__name__ for part in model.modules() if hasattr(part, "lora_A")}
    assert adapted == {"Linear4bit" if bits == 4 else "Linear8bitLt"}


@pytest.mark.parametrize(
    ("mib", "words"),
    [
        (0.5, "0.5 MiB"),
        (45.25, "45.2 MiB"),
        (1020, "1020 MiB"),
        (1023.6, "1.0 GiB"),
        (2**20, "1,024.0 GiB"),
        (math.inf, "inf GiB"),
    ],
)
def test_a_size_in_words_has_no_exponent(mib: float, words: str) -> None:
    assert memory.size_words(mib * 2**20) == words
