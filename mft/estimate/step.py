"""What a training step of a whole model holds beside weights and optimizer, from the trace of a short one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mft.model.checkpointing import Layers
    from mft.model.step_trace import Phase, StepTrace

Parts = dict[str, float]
"""Bytes by part."""

PER_LOGIT = 10
"""Bytes of a logit in a chunk: float32, in half precision before that and as a gradient, with a margin."""


def moments(trace: StepTrace) -> Iterator[tuple[str, int, Parts]]:
    """Yields, for each phase of a step of the whole model, its name, the number of its layer (-1 = none) and
    what is held where it takes the most.

    What a layer leaves in the forward pass and takes above that is what the layer that stands in for it does;
    gradients that stay are added up from the last layer to the first.
    """
    from mft.model.step_trace import GRADIENTS

    stands_in, gradients = trace.shortened.stands_in, 0.0
    yield "before", -1, dict(trace.before.peak)
    held = Counter(trace.forward[0].start)
    for number, i in enumerate(stands_in):
        phase = trace.forward[i]
        yield "forward", number, _plus(held, phase.peak, phase.start)
        held = Counter(_plus(held, phase.end, phase.start))
    yield "head", -1, _plus(held, trace.head.peak, trace.head.start)

    def back(phase: Phase, below: int, below_in_trace: int) -> Parts:
        """Returns the peak of a phase over what the first `below` layers still keep."""
        nonlocal gradients
        kept = Counter[str]()
        for i in stands_in[:below]:
            kept.update(trace.kept[i])
        counted = Counter[str]()
        for of_layer in trace.kept[:below_in_trace]:
            counted.update(of_layer)
        parts = _plus(kept, phase.peak, counted)
        parts[GRADIENTS] = gradients + phase.peak[GRADIENTS] - phase.start[GRADIENTS]
        gradients += phase.end[GRADIENTS] - phase.start[GRADIENTS]
        return parts

    yield "turn", -1, back(trace.turn, len(stands_in), len(trace.kept))
    for number, i in reversed(list(enumerate(stands_in))):
        yield "backward", number, back(trace.backward[i], number, i)
    yield "after", -1, back(trace.after, 0, 0)


def widened(
    of_few: Iterable[tuple[str, int, Parts]], tokens: float, logits: float
) -> Iterator[tuple[str, int, Parts]]:
    """Yields the moments of a step whose rows have `tokens` times as many tokens, and whose chunk has `logits`
    times as many logits."""
    from mft.model.step_trace import ACTIVATIONS, LOGITS

    times = {ACTIVATIONS: tokens, LOGITS: logits}
    for name, layer, parts in of_few:
        yield name, layer, {part: size * times.get(part, 1.0) for part, size in parts.items()}


def _plus(held: Counter[str], later: Counter[str], earlier: Counter[str]) -> Parts:
    """Returns held + later - earlier, of each part."""
    return {k: held[k] + later[k] - earlier[k] for k in held.keys() | later.keys() | earlier.keys()}


def by_formula(
    model: Any, layers: Layers, every: int, tokens: int, autocast: bool
) -> list[tuple[str, int, Parts]]:
    """Returns one moment that stands for a step, from the shapes of a layer's matrices: all activations, with
    a chunk of logits and all copies of weights that autocast makes.

    model: before it is shortened; tokens: of a micro-batch.
    """
    from mft.model.cross_entropy import default_chunk_size
    from mft.model.introspect import base_of, full_shape

    vocabulary = full_shape(base_of(model).get_input_embeddings().weight)[0]
    rows = min(tokens, default_chunk_size(vocabulary, "cuda", trained=False))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {
        "activations": layers.bytes(every, tokens),
        "logits": float(PER_LOGIT * rows * vocabulary),
        "copies": 2.0 * trained if autocast else 0.0,
        "gradients": 0.0,
    }
    return [("head", -1, parts)]
