"""What one rank of a run needs of memory, by part and by phase: from the config alone, before weights are read.

The step is watched on fake tensors where that is possible (`mft.model.step_trace`), else computed from the
shapes of a layer's matrices (`mft.model.checkpointing`). What engines hold, gather and exchange is added from
`engines`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from mft.batch import BatchSizes
from mft.config.build import Components, build_components
from mft.config.schema import batch_sizes
from mft.distributed.ddp import Ddp
from mft.distributed.fsdp import Fsdp
from mft.estimate import memory
from mft.estimate.engines import during, held, loading, saving
from mft.estimate.sizes import experts, tell_experts, units
from mft.hardware import computes_in_bf16

if TYPE_CHECKING:
    from mft.model.step_trace import Computing, Rows

log = logging.getLogger(__name__)

Parts = dict[str, float]
"""Bytes by part."""

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

_watched: dict[tuple[Any, ...], list[tuple[str, int, Parts]]] = {}
"""What was held in the steps that were watched, by all that decides it: backends have many in common."""


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
) -> RankMemory:
    """Returns what each of `world` ranks of a resolved config needs.

    device: kind of the device that it is for, cuda or cpu; rows: the micro-batch, None = the largest one;
    automatic: of how many layers one is recomputed where model.gradient_checkpointing is auto, 0 = none,
    None = as on a CPU, by the number of weights. Raises UserError where code of the checkpoint's own builds
    the model.
    """
    precision = str(getattr(cfg.train.precision, "value", cfg.train.precision))
    if precision == "auto":  # of a config that is not frozen yet
        precision = "bf16" if device == "cuda" or computes_in_bf16() else "fp32"
    accumulates = _sizes(cfg, world).accumulation > 1
    parts, rows = build_components(cfg), rows or rows_of(cfg)
    return _One(parts, world, device, precision, rows, accumulates, automatic).memory()


def _sizes(cfg: DictConfig, world: int) -> BatchSizes:
    return batch_sizes(OmegaConf.to_object(cfg.train), world)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _One:
    """One rank of a run."""

    parts: Components
    world: int
    device: str
    precision: str
    rows: Rows
    accumulates: bool
    automatic: int | None

    @property
    def half(self) -> bool:
        return self.precision != "fp32"

    def model(self) -> tuple[Any, int]:
        """Returns the model on the meta device, with adapters, and of how many layers one is recomputed."""
        from mft.model.prepared_skeleton import prepared_skeleton

        family, automatic = self.parts.model, self.automatic
        cast_to = self.parts.dist.casts_weights_to(self.precision)
        model = prepared_skeleton(family, self.parts.peft, self.precision, cast_to)
        return model, family.checkpoint(model, None if automatic is None else lambda: automatic)

    def memory(self) -> RankMemory:
        """Returns what the rank needs."""
        model, every = self.model()
        classes = self.parts.model.layer_classes(model)
        divided = units(model, classes, self._size, self._kept_whole)
        of_experts = experts(model, self._size)
        states = memory.optimizer_bytes(self.parts.optimizer, self.parts.base_lr)
        dist, gpu = self.parts.dist, self.device == "cuda"
        always = held(divided, dist, self.world, self.half, states, gpu, self.accumulates)
        notes: list[str] = []
        if getattr(self.parts.peft, "path", None):
            notes.append("peft.path: a new adapter stands in for it")
        moments = self._moments(model, classes, every, notes)
        left = 0.0 if "gradients" in always.device or dist.divided_parts() else 4.0 * divided.trained
        moments += [(name, -1, {"gradients": left}) for name in ("exchange", "update")]
        where = ""
        parts: Parts = {}
        for name, layer, computed in moments:
            extra = during(divided, dist, self.world, self.half, name, layer, self.accumulates, gpu)
            both = {k: computed.get(k, 0.0) + extra.get(k, 0.0) for k in computed.keys() | extra.keys()}
            if sum(both.values()) > sum(parts.values()) or not parts:
                where, parts = name, both
        whole = {
            k: always.device.get(k, 0.0) + parts.get(k, 0.0) for k in always.device.keys() | parts.keys()
        }
        tell_experts(whole, of_experts, divided)
        whole = {name: whole[name] for name in PARTS if whole.get(name, 0) > 0}
        device_saving, host_saving = saving(divided, dist, always, self.half)
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

    def _size(self, parameter: Any) -> int:
        """Returns the bytes of a frozen weight on a rank that has all of it."""
        from mft.model.peft.summary import bytes_of

        size = bytes_of(parameter)
        if self.parts.dist.casts_weights and self.half and parameter.is_floating_point():
            size = min(size, 2 * parameter.numel())
        return size

    def _kept_whole(self, parameter: Any) -> int:
        """Returns the bytes of a weight that ZeRO-3 does not divide, 0 of any other."""
        threshold = getattr(self.parts.dist, "persistence_threshold", 0)
        count, each = parameter.numel(), 2 if self.half else 4
        storage = getattr(parameter, "quant_storage", None)
        if storage is not None and getattr(parameter, "bnb_quantized", None) is False:
            # packed two to a byte, and counted in elements of what holds them
            count, each = -(-count // (2 * storage.itemsize)), storage.itemsize
        return int(count * each) if count <= threshold else 0

    def _moments(
        self, model: Any, classes: list[str], every: int, notes: list[str]
    ) -> list[tuple[str, int, Parts]]:
        from mft.estimate.step import by_formula
        from mft.model.checkpointing import Layers
        from mft.model.peft.full import compute_dtype
        from mft.model.step_trace import Computing

        dist = self.parts.dist
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
        layers = Layers.of(model, classes, self.half, self.rows.width)
        tokens = self.rows.count * self.rows.width
        by_shapes = by_formula(model, layers, every, tokens, self.half and not casts)
        try:
            key = (repr(self.parts.model), repr(self.parts.peft), every, self.rows, computing)
            if key not in _watched:
                _watched[key] = self._watched_moments(model, computing)
            return list(_watched[key])
        except Exception as error:  # a model may do anything
            log.debug("the step could not be watched", exc_info=True)
            reason = " ".join(str(error).split())[:200]
            notes.append(f"activations by formula, since the step could not be watched: {reason}")
            return by_shapes

    def _watched_moments(self, model: Any, computing: Computing) -> list[tuple[str, int, Parts]]:
        from mft.estimate.step import moments, widened
        from mft.model.cross_entropy import default_chunk_size
        from mft.model.introspect import base_of
        from mft.model.step_trace import trace_step
        from mft.model.token_loss import vocabulary
        from mft.model.transformers_private import is_stateful

        base, rows = base_of(model), self.rows
        if not is_stateful(base) or rows.width <= RECURRENT_TOKENS:
            return list(moments(trace_step(model, self.parts.model, rows, computing)))
        head = base.get_output_embeddings()
        trained = any(p.requires_grad for p in head.parameters())
        chunk = default_chunk_size(vocabulary(head), self.device, trained)
        few = replace(rows, width=RECURRENT_TOKENS)
        of_few = moments(trace_step(model, self.parts.model, few, computing))
        logits = min(rows.count * rows.width, chunk) / min(few.count * few.width, chunk)
        return list(widened(of_few, rows.width / few.width, logits))
