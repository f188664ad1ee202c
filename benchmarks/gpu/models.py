"""Llamas with random weights as checkpoints, and rows of random tokens."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from mft.batch import StepBatches
from tests.gpu.children import Place
from tests.model.rows import batch


@dataclass(frozen=True)
class Shape:
    """A llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    tied: bool = True


SHAPES = {
    "7B": Shape(4096, 32, 32, 32, 11008, 32_000, tied=False),
    "1.2B": Shape(2048, 16, 32, 8, 8192, 128_256),
    "135M": Shape(576, 30, 9, 3, 1536, 49_152),
}
"""llama 2 7B; llama 3.2 1B; SmolLM2 135M."""

TINY = Shape(128, 2, 4, 2, 256, 512)
"""Stands for each of them where the script is tried."""

SAMPLES = {"P": 14, "O": 1, "M": 60}
"""Samples in a row: packed ones, one long one, many short ones."""


def shape(name: str, place: Place) -> Shape:
    """Returns the shape of a name."""
    return TINY if place.small else SHAPES[name]


def length(place: Place) -> int:
    """Returns the tokens of a row."""
    return 256 if place.small else 4096


def folder(name: str, place: Place) -> Path:
    """Returns the checkpoint in bf16 of a model's name, written by the cell that first asks."""
    path = place.folder / name
    if not (path / "config.json").exists():
        write(shape(name, place), path, place)
    return path


def write(of: Shape, path: Path, place: Place) -> None:
    """Writes a checkpoint whose weights are drawn on the device."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=of.hidden,
        num_hidden_layers=of.layers,
        num_attention_heads=of.heads,
        num_key_value_heads=of.kv_heads,
        intermediate_size=of.feed_forward,
        vocab_size=of.vocabulary,
        tie_word_embeddings=of.tied,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device(place.device):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    weights = model.state_dict()
    if of.tied:
        del weights["lm_head.weight"]
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.cpu() for name, value in weights.items()}, path / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(path)  # last: it says that the folder is complete


def lengths(kind: str, total: int, seed: int) -> list[int]:
    """Returns the tokens of each sample of a row, lognormal, at least one; they add up to `total`."""
    count = min(SAMPLES[kind], total)
    drawn = numpy.random.default_rng(seed).lognormal(0.0, 0.8, count)
    found = numpy.maximum(1, numpy.floor(drawn / drawn.sum() * total).astype(int))
    found[int(found.argmax())] += total - int(found.sum())
    return [int(n) for n in found]


@dataclass(frozen=True)
class Rows:
    """Steps of one row each, four different ones in turn."""

    kind: str
    """P, O or M."""
    total: int
    vocabulary: int

    def steps(self, epoch: int, rows_consumed: int, count: int) -> Generator[StepBatches]:
        """See `mft.training.trainer.StepSource`."""
        for number in range(count):
            row = lengths(self.kind, self.total, number % 4)
            data = batch([row], self.total, self.vocabulary, seed=number % 4)
            yield StepBatches([data], 0, number + 1, 0.0)
