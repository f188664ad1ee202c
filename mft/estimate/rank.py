"""What one rank of a run needs of memory, by part and by phase: from the config alone, before weights are read.

The step is watched on fake tensors where that is possible (`mft.model.step_trace`), else computed from the
shapes of a layer's matrices (`mft.model.checkpointing`). What engines hold, gather and exchange is added from
`engines`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from mft.batch import BatchSizes
from mft.config.build import Components, build_components
from mft.config.schema import batch_sizes
from mft.distributed.ddp import Ddp
from mft.distributed.fsdp import Fsdp
from mft.estimate import memory
from mft.estimate.engines import during, held, loading, saving
from mft.estimate.sizes import set_experts_apart
from mft.estimate.skeletons import Skeleton, Skeletons
from mft.hardware import computes_in_bf16

if TYPE_CHECKING:
    from mft.model.step_trace import Computing, Rows

log = logging.getLogger(__name__)

Parts = dict[str, float]
"""Bytes by part."""

Moment = tuple[str, int, Parts]
"""A phase of a step, the number of its layer, and what is held then (see `mft.estimate.step.moments`)."""

PARTS = {
    "weights": "trained weights, as they are computed with",
    "frozen": "weights that are not trained, in the dtype they are loaded in",
    "packed": "weights quantised to 4 or 8 bits, with their scales",
    "experts": "routed experts, trained or not",
    "gradients": "of what is trained, or a rank's part of them",
    "optimizer": "its states, and the float32 copy of the weights that some engines update",
    "activations": "what the backward pass needs of the forward pass, and what is in work",
    "copies": "weights in the computing dtype, made by autocast",
    "logits": "of one chunk, with their gradient",
    "gathers": "weights of other ranks while they are computed with",
    "buckets": "gradients on their way between ranks",
}
"""Part of a rank's memory → what it is."""


RECURRENT_TOKENS = 256
"""Tokens of a row that is watched where layers go through them one by one, which takes seconds each hundred;
what they keep grows with their number."""


@dataclass(frozen=True)
class RankMemory:
    """What one rank needs, in bytes."""

    parts: Parts
    """On the device at the peak of a training step, by the names of PARTS."""
    host: Parts
    """What is offloaded to the CPU's memory, likewise."""
    loading: float
    """The device's peak until the model is prepared."""
    step: float
    """The device's peak in training steps: the sum of `parts`."""
    saving: float
    """The device's peak while a checkpoint is written."""
    host_saving: float
    """What the first rank holds in the CPU's memory while a checkpoint is written."""
    every: int
    """Of how many layers one is recomputed, 0 = none."""
    where: str
    """In which phase of a step the peak is."""
    notes: list[str] = field(default_factory=list)
    """What was not counted or only by formula, in sentences."""

    @property
    def peak(self) -> float:
        """The largest of the three phases."""
        return max(self.loading, self.step, self.saving)


def rows_of(cfg: DictConfig) -> Rows:
    """Returns the largest micro-batch of a config: full rows, all of whose tokens carry loss. Where its size is
    still to be found it is one row."""
    from mft.model.step_trace import Rows

    parts = build_components(cfg)
    # how many samples share a row is not known before the data is read
    samples = 4 if parts.rows.packs_samples else 1
    return Rows(_sizes(cfg, 1).per_device, int(cfg.data.seq_length), samples)


def rank_memory(
    cfg: DictConfig,
    world: int,
    device: str = "cuda",
    rows: Rows | None = None,
    automatic: int | None = None,
    skeletons: Skeletons | None = None,
) -> RankMemory:
    """Returns what each of `world` ranks of a resolved config needs.

    device: kind of the device that it is for, cuda or cpu; rows: the micro-batch, None = the largest one;
    automatic: of how many layers one is recomputed where model.gradient_checkpointing is auto, 0 = none,
    None = as on a CPU, by the number of weights; skeletons: those of earlier estimates. Raises UserError
    where code of the checkpoint's own builds the model.
    """
    precision = str(getattr(cfg.train.precision, "value", cfg.train.precision))
    if precision == "auto":  # of a config that is not frozen yet
        precision = "bf16" if device == "cuda" or computes_in_bf16() else "fp32"
    accumulates = _sizes(cfg, world).accumulation > 1
    parts, rows = build_components(cfg), rows or rows_of(cfg)
    skeleton = (skeletons or Skeletons()).of(parts, precision)
    return _One(parts, skeleton, world, device, precision, rows, accumulates, automatic).memory()


def _sizes(cfg: DictConfig, world: int) -> BatchSizes:
    return batch_sizes(OmegaConf.to_object(cfg.train), world)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _One:
    """One rank of a run."""

    parts: Components
    skeleton: Skeleton
    world: int
    device: str
    precision: str
    rows: Rows
    accumulates: bool
    automatic: int | None

    @property
    def half(self) -> bool:
        return self.precision != "fp32"

    def memory(self) -> RankMemory:
        """Returns what the rank needs."""
        dist, gpu = self.parts.dist, self.device == "cuda"
        threshold = getattr(dist, "persistence_threshold", 0)
        divided, of_experts = self.skeleton.divided(self.half, dist.casts_weights, threshold)
        states = memory.optimizer_bytes(self.parts.optimizer, self.parts.base_lr)
        always = held(divided, dist, self.world, self.half, states, gpu, self.accumulates)
        notes: list[str] = []
        if getattr(self.parts.peft, "path", None):
            notes.append("peft.path: a new adapter stands in for it")
        every, computed, note = self._step()
        notes += [note] if note else []
        left = 0.0 if "gradients" in always.device or dist.divided_parts() else 4.0 * divided.trained
        moments = [*computed, *((name, -1, {"gradients": left}) for name in ("exchange", "update"))]
        where = ""
        parts: Parts = {}
        for name, layer, own in moments:
            extra = during(divided, dist, self.world, self.half, name, layer, self.accumulates, gpu)
            both = {k: own.get(k, 0.0) + extra.get(k, 0.0) for k in own.keys() | extra.keys()}
            if sum(both.values()) > sum(parts.values()) or not parts:
                where, parts = name, both
        whole = {
            k: always.device.get(k, 0.0) + parts.get(k, 0.0) for k in always.device.keys() | parts.keys()
        }
        set_experts_apart(whole, of_experts, divided)
        whole = {name: whole[name] for name in PARTS if whole.get(name, 0) > 0}
        device_saving, host_saving = saving(divided, dist, always)
        return RankMemory(
            parts=whole,
            host=always.host,
            loading=loading(divided, dist, self.world, self.half, always),
            step=sum(whole.values()),
            saving=device_saving,
            host_saving=host_saving,
            every=every,
            where=where,
            notes=notes,
        )

    def _step(self) -> tuple[int, list[Moment], str]:
        """Returns of how many layers one is recomputed, the moments of a step, and a note on them, or ""."""
        from mft.model import checkpointing
        from mft.model.introspect import base_of
        from mft.model.peft.full import compute_dtype
        from mft.model.step_trace import Computing

        dist, model, automatic = self.parts.dist, self.skeleton.model, self.automatic
        half = compute_dtype(self.precision) if self.half else None
        casts, ddp = dist.casts_weights, dist.divided_parts() == set()
        computing = Computing(
            device=self.device,
            autocast=None if casts else half,
            trained=half if casts else None,
            frozen=half if casts else None,
            gradients="stay" if ddp else "unit" if isinstance(dist, Fsdp) else "leave",
            adds_gradients=ddp and (self.accumulates or isinstance(dist, Ddp)),
        )
        try:
            every = self.parts.model.checkpoint(model, None if automatic is None else lambda: automatic)
            moments, note = self.skeleton.once(
                ("step", every, self.rows, self.half, computing), lambda: self._moments(every, computing)
            )
        finally:
            checkpointing.disable(base_of(model))
        return every, moments, note

    def _moments(self, every: int, computing: Computing) -> tuple[list[Moment], str]:
        from mft.estimate.step import by_formula
        from mft.model.checkpointing import Layers

        try:
            return self._watched_moments(computing), ""
        except Exception as error:  # a model may do anything
            log.debug("the step could not be watched", exc_info=True)
            reason = " ".join(str(error).split())[:200]
        skeleton, rows = self.skeleton, self.rows
        layers = Layers.of(skeleton.model, skeleton.classes, self.half, rows.width)
        autocast = computing.autocast is not None
        by_shapes = by_formula(skeleton.model, layers, every, rows.count * rows.width, autocast)
        return by_shapes, f"activations by formula, since the step could not be watched: {reason}"

    def _watched_moments(self, computing: Computing) -> list[Moment]:
        from mft.estimate.step import moments, widened
        from mft.model.cross_entropy import default_chunk_size
        from mft.model.introspect import base_of
        from mft.model.step_trace import trace_step
        from mft.model.token_loss import vocabulary
        from mft.model.transformers_private import is_stateful

        model, family, rows = self.skeleton.model, self.parts.model, self.rows
        base = base_of(model)
        if not is_stateful(base) or rows.width <= RECURRENT_TOKENS:
            return list(moments(trace_step(model, family, rows, computing)))
        head = base.get_output_embeddings()
        trained = any(p.requires_grad for p in head.parameters())
        chunk = default_chunk_size(vocabulary(head), self.device, trained)
        few = replace(rows, width=RECURRENT_TOKENS)
        of_few = moments(trace_step(model, family, few, computing))
        logits = min(rows.count * rows.width, chunk) / min(few.count * few.width, chunk)
        return list(widened(of_few, rows.width / few.width, logits))
