"""How long a step takes: its FLOPs over a rate, and what ranks and offloading add to it.

`step_time` is a model whose constants are assumptions, below: it compares changes of a config. A rate that
is given or was measured takes its place for the config itself, see `mft.plan.rates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mft.estimate.memory import Sizes
from mft.plan.case import Case
from mft.plan.gpus import CARDS, REFERENCE, Card

ASSUMED = 0.4
"""Share of a GPU's peak that matrix products reach in a step, recomputation counted as work."""

UNPACKING = {0: 1.0, 4: 1.3, 8: 1.6}
"""Bits of a quantised weight → times that a step takes longer: the weights are unpacked for each product."""

SMALL = 100
"""Tokens of a micro-batch with which it takes twice as long a token as with very many."""

FLOAT32 = 1 / 8
"""Speed of float32 beside that of half precision."""

EXPOSED = 0.5
"""Share of an exchange between ranks that computing does not hide."""

NETWORK = 25.0
"""GB/s of a GPU between machines."""

BUS = 20.0
"""GB/s between a GPU and the host's memory."""

UPDATE = 28 / 10e9
"""Seconds of a weight whose optimizer runs on the host: 28 bytes that a rank reads and writes, at 10 GB/s."""

ON_CPU = Card(gib=0, tflops=0.1, link=5)
"""Stands for a CPU, of which only changes are compared."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step."""

    flops: float
    """Matrix work of one rank, recomputation included."""
    compute: float
    exchange: float
    """What is not hidden behind computing."""
    offload: float
    """Copies to and from the host, and the update there."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.exchange + self.offload


def card_for(of: Case) -> Card:
    """Returns the data that a case's speed is modelled by."""
    return ON_CPU if of.device.kind == "cpu" else of.device.card or CARDS[REFERENCE]


def step_time(of: Case, every: int, tokens: float) -> StepTime:
    """Returns the time of a step.

    every: of so many layers one is recomputed, 0 = none; tokens: of a step, over all ranks.
    """
    card, half, skeleton = card_for(of), of.cfg.train.precision.value != "fp32", of.skeleton
    work = skeleton.flops(every)
    flops = (work.model + work.recomputed) * tokens / of.world
    micro_batch = max(1.0, tokens / of.world / of.sizes.accumulation)
    slower = UNPACKING[skeleton.bits] * (1 + SMALL / micro_batch)
    compute = flops * slower / (card.tflops * 1e12 * ASSUMED * (1 if half else FLOAT32))
    link = card.link if of.machines == 1 else min(card.link, NETWORK)
    exchange = EXPOSED * _exchanged(of, skeleton.sizes, 2 if half else 4) / (link * 1e9)
    return StepTime(flops, compute, exchange, _offload(of, skeleton.sizes, 2 if half else 4))


def _passes(dist: Any) -> int:
    """Returns how often a micro-batch reads weights that are divided over the ranks, or on the host."""
    return 2 if getattr(dist, "reshard", True) else 1


def _exchanged(of: Case, sizes: Sizes, each: int) -> float:
    """Returns the bytes that a rank exchanges in a step; each: of a weight in the run's precision."""
    dist: Any = of.parts.dist
    divided, micro_batches, trained = dist.divided_parts(), of.sizes.accumulation, sizes.trained
    if of.world == 1:
        return 0.0
    moved = 0.0
    if "weights" in divided:
        held = trained * each + sizes.frozen_bytes
        moved += _passes(dist) * held * micro_batches
    if "gradients" in divided:
        often = micro_batches if getattr(dist, "reduce_every_micro_batch", True) else 1
        moved += trained * each * often + (0 if "weights" in divided else trained * each)
    else:
        moved += 2 * trained * 4  # there and back, in float32
    return moved * (of.world - 1) / of.world


def _offload(of: Case, sizes: Sizes, each: int) -> float:
    """Returns the seconds that offloading to the host takes in a step."""
    dist: Any = of.parts.dist
    everything, own = getattr(dist, "offload", False), sizes.trained / of.world
    seconds = 0.0
    if everything or getattr(dist, "offload_optimizer", False):
        seconds += 2 * own * each / (BUS * 1e9) + own * UPDATE
    if everything or getattr(dist, "offload_parameters", False):
        held = own * each + sizes.frozen_bytes / of.world
        seconds += _passes(dist) * held * of.sizes.accumulation / (BUS * 1e9)
    return seconds
