"""Stands in for mft.estimate.rank until that is here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mft.estimate import memory
from mft.model.checkpointing import EVERY, Layers, layers_between


@dataclass(frozen=True)
class RankMemory:
    parts: dict[str, float]
    host: dict[str, float]
    loading: float
    step: float
    saving: float
    every: int
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> float:
        return max(self.loading, self.step, self.saving)


def rank_memory(cfg: Any, world: int, device: str = "cuda", total: float | None = None) -> RankMemory:
    from mft.config.build import build_components
    from mft.config.schema import batch_sizes
    from mft.plan.case import Case
    from mft.plan.weights import weights as count

    c = build_components(cfg)
    weights = count(Case(cfg, c, None, world, 1))
    half = cfg.train.precision.value != "fp32"
    states = memory.optimizer_bytes(c.optimizer, c.base_lr)
    held = memory.by_part(weights.sizes, c.dist, world, half, states)
    layers = Layers.of(weights.model, weights.classes, half, int(cfg.data.seq_length))
    divided = "weights" in c.dist.divided_parts()
    copied = weights.sizes.trained if half else 0
    tokens = batch_sizes(cfg.train, world).per_device * cfg.data.seq_length
    beside = memory.beside_activations(weights.model, held, layers, tokens, divided, copied)
    set_to = layers_between(c.model.gradient_checkpointing)
    for every in EVERY if set_to is None else (set_to,):
        parts = held | {"logits": beside - sum(held.values()), "activations": layers.bytes(every, tokens)}
        step = sum(parts.values())
        found = RankMemory(parts, {}, held["weights"], step, sum(held.values()), every)
        if total is None or found.peak <= memory.USABLE * total - memory.CONTEXT:
            break
    return found
