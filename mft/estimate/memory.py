"""What a rank needs of memory, by part: computed from the model, which may be on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mft.distributed.engine import Backend
from mft.model.checkpointing import Layers, choose
from mft.model.introspect import base_of, full_shape, parameter_count
from mft.model.peft.summary import AuditRow, total_of

if TYPE_CHECKING:
    from torch import nn

CONTEXT = 2**30
"""Bytes of a GPU's memory that CUDA itself takes."""

USABLE = 0.9
"""Share of a GPU's memory that is counted on; the rest is for fragments and for exchanges between ranks."""

PER_LOGIT = 10
"""Bytes of a logit in a chunk: float32, in half precision before that and as a gradient, with a margin."""

NOT_COUNTED = "activations, buffers of exchanges, the CUDA context (about 1 GiB)"


@dataclass(frozen=True)
class Sizes:
    """Of a model with what is trained in it."""

    trained: int
    """Weights that are trained."""
    frozen_bytes: int
    """What all others take in memory."""
    whole: bool
    """Whether all weights are trained, so that a checkpoint holds the model and not an adapter."""

    @classmethod
    def of(cls, model: nn.Module, rows: Sequence[AuditRow]) -> Sizes:
        """rows: the audit of `model`, which may be on the meta device."""
        trained = total_of(rows, "trainable")
        # ds_numel: of a weight that ZeRO-3 has divided while it was loaded
        numels = [(p, getattr(p, "ds_numel", p.numel())) for p in model.parameters() if p.requires_grad]
        of_trained = sum(numel * p.element_size() for p, numel in numels)
        return cls(trained, total_of(rows, "bytes") - of_trained, trained == parameter_count(model))


def optimizer_bytes(optimizer: Any, lr: float) -> float:
    """Returns the bytes that an optimizer keeps for a trained weight.

    Measured by a step of a small matrix on the CPU (AdamW, 8-bit AdamW, Adafactor, Adagrad, SGD: 0.1 to 3 ms).
    """
    import torch

    weight = torch.nn.Parameter(torch.zeros(128, 128))
    live = optimizer.build([("weight", weight)], lr)
    weight.grad = torch.zeros_like(weight)
    live.step()
    states = [value for value in live.state[weight].values() if torch.is_tensor(value) and value.dim()]
    return sum(state.nbytes for state in states) / weight.numel()


def by_part(sizes: Sizes, dist: Backend, world: int, half: bool, states: float) -> dict[str, float]:
    """Returns the bytes that a rank holds, by part.

    half: whether the run computes in bf16 or fp16; states: of the optimizer, bytes for a trained weight.
    """
    each, divided = dist.bytes_per_trained_weight(half), dist.divided_parts()
    whole = {
        "weights": sizes.frozen_bytes + each["weights"] * sizes.trained,
        "gradients": each["gradients"] * sizes.trained,
        "optimizer": (each["optimizer"] + states) * sizes.trained,
    }
    return {name: size / world if name in divided else size for name, size in whole.items()}


def beside_activations(
    model: nn.Module, held: dict[str, float], layers: Layers, tokens: int, divided: bool, copied: int
) -> float:
    """Returns the bytes of a rank beside what is kept for the backward pass.

    held: see `by_part`; tokens: of a micro-batch. Added are a chunk of logits with its gradient (of the size
    that it has on a GPU) and bf16 copies of weights: where they are divided over the ranks, of two layers,
    embedding and head, which are whole at a time; else of `copied` weights, of which autocast makes them.
    """
    from mft.model.cross_entropy import default_chunk_size

    vocabulary, width = full_shape(base_of(model).get_input_embeddings().weight)[:2]
    rows = min(tokens, default_chunk_size(vocabulary, "cuda", trained=False))
    copies = 2 * (layers.weights + vocabulary * width) if divided else copied
    return sum(held.values()) + 2 * copies + PER_LOGIT * rows * vocabulary


def recomputed(layers: Layers, tokens: int, held: float, total: float) -> tuple[int, str]:
    """Returns of how many layers one is recomputed, 0 = none, on a GPU of `total` bytes, and why.

    tokens: of a micro-batch; held: see `beside_activations`.
    """
    room = USABLE * total - CONTEXT
    every = choose(layers, tokens, held, room)
    needed = held + layers.bytes(every, tokens)
    reason = f"; auto: about {size_words(needed)} of the {size_words(room)} that a GPU has for it"
    return every, reason + (f", without it {size_words(held + layers.bytes(0, tokens))}" if every else "")


def size_words(size: float) -> str:
    """Returns bytes in words: 12.3 GiB, 45 MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.3g} MiB"


def words(parts: dict[str, float], world: int, offloads: bool) -> str:
    """Returns a rank's memory in words, with what is not counted."""
    shown = " + ".join(f"{name} {size_words(size)}" for name, size in parts.items())
    moved = "; a part of it in the CPU's memory, by the offload settings" if offloads else ""
    ranks = f" in each of {world} ranks" if world > 1 else ""
    return f"{size_words(sum(parts.values()))}{ranks} = {shown}{moved}; not counted: {NOT_COUNTED}"
