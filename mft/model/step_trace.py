"""What a training step holds in memory beside weights and optimizer, found by watching one of fake tensors.

The modules are the run's own: token loss, adapters, attention, the layers that are recomputed. A step is cut
into phases (`Phase`), each of one layer, so that those of a long model follow from those of a short one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mft.batch import IGNORE, Batch
from mft.model import fast_attention
from mft.model.cross_entropy import default_chunk_size
from mft.model.fake_model import Shortened, grouped_product, make_fake, shorten
from mft.model.introspect import base_of
from mft.model.tensor_ledger import TEMPORARY, Ledger
from mft.model.token_loss import TokenLoss, vocabulary
from mft.model.torch_private import varlen
from mft.model.transformers_private import experts_multiplied_by

WEIGHTS, GRADIENTS, ACTIVATIONS, COPIES, LOGITS = "weights", "gradients", "activations", "copies", "logits"


@dataclass(frozen=True)
class Rows:
    """The micro-batch that is watched."""

    count: int
    """Rows."""
    width: int
    """Tokens of each."""
    samples: int = 1
    """Samples in each row, side by side."""
    trained: float = 1.0
    """Share of the tokens that carry loss."""

    def batch(self) -> Batch:
        """Returns the micro-batch, on the CPU."""
        place_T = torch.arange(self.width)
        size = -(-self.width // self.samples)
        sample_BT = place_T // size + (int(place_T[-1]) // size + 1) * torch.arange(self.count)[:, None]
        ids_BT = torch.zeros(self.count, self.width, dtype=torch.int64)
        share_BT = torch.arange(ids_BT.numel()).view_as(ids_BT)
        kept = (share_BT * self.trained).floor() != ((share_BT + 1) * self.trained).floor()
        target_BT = torch.where(kept, ids_BT, IGNORE)
        position_BT = (place_T % size).expand(self.count, -1).contiguous()
        return Batch(ids_BT, target_BT, torch.zeros_like(ids_BT), sample_BT, position_BT)


@dataclass(frozen=True)
class Computing:
    """How a step computes."""

    device: str
    """Kind of the device that it is meant for, cuda or cpu."""
    autocast: torch.dtype | None
    """None: without."""
    trained: torch.dtype | None
    """Of trained weights, None = as they are loaded."""
    frozen: torch.dtype | None
    """Of frozen ones, likewise."""
    gradients: str
    """What becomes of them when they are complete: they "stay" until the update, "leave" at once, or leave
    with all others of their layer ("unit")."""
    adds_gradients: bool
    """Whether there are gradients from the beginning, to which others are added."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a step, by part in bytes."""

    start: Counter[str]
    """Held at its beginning."""
    peak: Counter[str]
    """Held where it takes the most."""
    end: Counter[str]
    """Held at its end."""


@dataclass(frozen=True)
class StepTrace:
    """The phases of a step of a shortened model, weights not counted."""

    shortened: Shortened
    before: Phase
    """Until the first layer: embedding, positions."""
    forward: list[Phase]
    """Of each layer."""
    head: Phase
    """From the last layer to the end of the forward pass."""
    kept: list[Counter[str]]
    """What each layer leaves for the backward pass."""
    turn: Phase
    """From there to the gradient of the last layer's output."""
    backward: list[Phase]
    """Of each layer, by its number."""
    after: Phase
    """From the first layer's gradient on: the embedding's."""


class _Watch:
    """Marks where the phases of a step begin."""

    def __init__(self, layers: list[nn.Module], ledger: Ledger, leaving: bool):
        """leaving: whether a layer's gradients are taken away when those of all its weights are complete."""
        self.layers, self.ledger, self.leaving = layers, ledger, leaving
        self.marks: dict[tuple[str, int], int] = {}

    @contextmanager
    def marking(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                before = layer.register_forward_pre_hook(self._entered(number), with_kwargs=True)
                after = layer.register_forward_hook(self._left(number))
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _gone_back(self, number: int) -> None:
        """Begins the backward pass of a layer, or with -1 what follows the first one's."""
        for layer in self.layers[number + 1 :] if self.leaving else ():
            for weight in layer.parameters():
                weight.grad = None
        self.mark(*(("backward", number) if number >= 0 else ("after", 0)))

    def mark(self, name: str, number: int = 0) -> None:
        self.marks.setdefault((name, number), len(self.ledger.events))

    def _entered(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.mark("forward", number)
            hidden = args[0] if args else kwargs.get("hidden_states")
            if number == 0 and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._gone_back(-1))

        return hook

    def _left(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if number == len(self.layers) - 1:
                self.mark("head")
            hidden.register_hook(lambda gradient: self._gone_back(number))

        return hook

    def phases(self, shortened: Shortened) -> StepTrace:
        last = len(self.layers) - 1
        order = [("before", 0), *(("forward", n) for n in range(last + 1)), ("head", 0), ("turn", 0)]
        order += [*(("backward", n) for n in range(last, -1, -1)), ("after", 0)]
        self.mark("after")
        found: dict[tuple[str, int], Phase] = {}

        def held(until: int, *born: int) -> Counter[str]:
            parts = self.ledger.held(until, *born)
            parts[ACTIVATIONS] = parts.pop(TEMPORARY, 0)
            del parts[WEIGHTS]
            return parts

        for key, following in zip(order, [*order[1:], None], strict=True):
            first = self.marks[key]
            stop = len(self.ledger.events) if following is None else self.marks[following]
            start, end, peak = held(first), held(stop), held(self.ledger.peak(first, stop)[0])
            found[key] = Phase(start, peak, end)
        by_layer = [[found[kind, n] for n in range(last + 1)] for kind in ("forward", "backward")]
        ends = [*(("forward", n) for n in range(1, last + 1)), ("head", 0)]
        kept = [
            held(self.marks["turn", 0], self.marks["forward", n], self.marks[key])
            for n, key in enumerate(ends)
        ]
        return StepTrace(
            shortened=shortened,
            before=found["before", 0],
            forward=by_layer[0],
            head=found["head", 0],
            kept=kept,
            turn=found["turn", 0],
            backward=by_layer[1],
            after=found["after", 0],
        )


@contextmanager
def _autocast_of_a_gpu(enabled: bool) -> Iterator[None]:
    """Says that a GPU's autocast is on too: by that alone peft decides whether to cast what a quantised layer
    reads."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def trace_step(model: Any, family: Any, rows: Rows, computing: Computing) -> StepTrace:
    """Returns what a step of a model on the meta device holds; a copy of it is watched.

    model: with adapters, and told which layers to recompute. Raises whatever a model raises that looks at
    values, or is built in another way than most.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    shortened = shorten(model, family.layer_classes(model))
    base = base_of(shortened.model)
    token_loss = TokenLoss(shortened.model, family)
    token_loss.apart = True  # not to be tried without values
    head = base.get_output_embeddings()
    trained_head = any(p.requires_grad for p in head.parameters())
    chunk = token_loss.chunk_size = default_chunk_size(vocabulary(head), computing.device, trained_head)
    columns = vocabulary(head)
    batch = rows.batch()
    copied: set[int] = set()

    def naming(result: torch.Tensor, func: Any, args: Any) -> str | None:
        if result.dim() == 2 and result.shape[-1] == columns and result.shape[0] <= chunk:
            return LOGITS
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in copied:
            return COPIES
        return None

    ledger = Ledger(naming)
    watch = _Watch(shortened.layers, ledger, computing.gradients == "unit")
    gpu = fast_attention.Machine("cuda", (9, 0), varlen()) if computing.device == "cuda" else None
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        fast_attention.standing_for(gpu),
        experts_multiplied_by(grouped_product),
    ):
        make_fake(token_loss, computing.trained, computing.frozen)
        trained = [p for p in token_loss.parameters() if p.requires_grad]
        copied |= {p.untyped_storage()._cdata for p in token_loss.parameters()}
        ledger.own([*token_loss.parameters(), *token_loss.buffers()], WEIGHTS)
        if computing.adds_gradients:
            for weight in trained:
                weight.grad = torch.empty_like(weight)
            ledger.own([weight.grad for weight in trained if weight.grad is not None], WEIGHTS)

        def arrived(weight: torch.Tensor) -> None:
            if computing.gradients == "leave":
                weight.grad = None
            elif computing.gradients == "stay" and not computing.adds_gradients and weight.grad is not None:
                ledger.own([weight.grad], GRADIENTS)

        for weight in trained:
            weight.register_post_accumulate_grad_hook(arrived)
        half = computing.autocast is not None
        autocast = torch.autocast("cpu", computing.autocast, enabled=half)
        with watch.marking(), ledger:
            watch.mark("before")
            with autocast, _autocast_of_a_gpu(half and computing.device == "cuda"):
                nll_BT, router = token_loss(batch)
            watch.mark("turn")
            share = nll_BT.sum() + router
            del nll_BT, router
            share.backward()
            del share
    return watch.phases(shortened)
