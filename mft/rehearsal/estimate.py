"""What a rank needs of memory, and a checkpoint of disk: computed from the model on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.distributed.engine import Backend
from mft.files.disk import free_bytes, nearest_folder
from mft.model.introspect import parameter_count
from mft.model.peft.summary import AuditRow, total_of

if TYPE_CHECKING:
    from torch import nn

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
        """rows: the audit of `model`, which is on the meta device."""
        trained = total_of(rows, "trainable")
        of_trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return cls(trained, total_of(rows, "bytes") - of_trained, trained == parameter_count(model))


def optimizer_bytes(optimizer: Any, lr: float) -> float:
    """Returns the bytes that an optimizer keeps for a trained weight, measured on a small matrix."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(128, 128))
    live = optimizer.build([("weight", weight)], lr)
    weight.grad = torch.zeros_like(weight)
    live.step()
    states = [value for value in live.state[weight].values() if torch.is_tensor(value) and value.dim()]
    return sum(state.nbytes for state in states) / weight.numel()


def memory(sizes: Sizes, dist: Backend, world: int, half: bool, states: float) -> dict[str, float]:
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


def size_words(size: float) -> str:
    """Returns bytes in words: 12.3 GiB, 45 MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.3g} MiB"


def memory_words(parts: dict[str, float], world: int, offloads: bool) -> str:
    """Returns a rank's memory in words, with what is not counted."""
    shown = " + ".join(f"{name} {size_words(size)}" for name, size in parts.items())
    moved = "; a part of it in the CPU's memory, by the offload settings" if offloads else ""
    ranks = f" in each of {world} ranks" if world > 1 else ""
    return f"{size_words(sum(parts.values()))}{ranks} = {shown}{moved}; not counted: {NOT_COUNTED}"


def checkpoint_bytes(sizes: Sizes, states: float, gathers: bool) -> float:
    """Returns the size of a checkpoint: the trained weights as peft or transformers load them, and the state
    that a run resumes from. gathers: whether it holds the former."""
    return sizes.trained * ((4 if gathers else 0) + 4 + states)


def checkpoint_words(newest: float, older: float, kept: int | None, written: int, folder: Path) -> str:
    """Returns the sizes of checkpoints beside the free space of the disk.

    newest, older: bytes of the newest one and of each other one; kept: checkpoints beside the best one,
    None = all; written: those that the run writes; folder: where they go, which need not exist yet.
    """
    there = nearest_folder(folder)
    free = free_bytes(there)
    most = written if kept is None else min(written, kept + 1)
    total = newest + older * (most - 1)
    each = (
        f"{size_words(newest)} each"
        if older == newest
        else f"{size_words(newest)}, older {size_words(older)}"
    )
    words = f"{each}, {most:,} kept at most: {size_words(total)}"
    few = ", which is too little: set train.keep, or a larger train.save_every" if total > free else ""
    return f"{words}; {size_words(free)} are free in {there}{few}"
