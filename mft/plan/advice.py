"""What to change where a config does not fit: each change re-estimated, ordered by what it costs in time.

A change is a few overrides that can be added to the command line.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.data.settings import LongSamples
from mft.errors import UserError
from mft.model.checkpointing import SETTING
from mft.plan.case import Case, changed, composed
from mft.plan.data import DataPlan
from mft.plan.plan import Plan, plan

Change = tuple[str, ...]
"""Overrides."""

DIVIDING = ("dist=zero2", "dist=zero3", "dist=fsdp")
REDUCING = "dist.reduce_every_micro_batch=true"
OFFLOADING: tuple[Change, ...] = (
    ("dist=zero2", "dist.offload_optimizer=true"),
    ("dist=zero3", "dist.offload_optimizer=true", "dist.offload_parameters=true"),
    ("dist=fsdp", "dist.offload=true"),
)
RECOMPUTING = ((4, "4"), (2, "2"), (1, "true"))
"""Of so many layers one is recomputed, as the setting has it."""

OF_A_STEP = ("activations", "logits")
"""Parts that grow with the tokens of a micro-batch."""

ENOUGH = 3
"""Changes together that fit, after which no more are tried."""

LESS = 0.99
"""Share of the memory that a change leaves at most, to be shown."""

SHORTEST = 256
"""Tokens below which data.seq_length is not lowered."""


@dataclass(frozen=True)
class Advice:
    """A change of a config, and what comes of it."""

    overrides: Change
    """To be added to the command line."""
    plan: Plan
    effect: str
    """What it changes of the experiment, "" where that stays what it is."""

    def slower(self, of: Plan) -> float:
        """Returns how many times as long a token takes as in another plan."""
        return (self.plan.time.seconds / self.plan.tokens) / (of.time.seconds / of.tokens)


class Advisor:
    """Tries changes of a config that does not fit.

    overrides, config_dirs: of the command line; of: its plan; data: what it takes of its tasks.
    """

    def __init__(
        self, overrides: Sequence[str], config_dirs: Sequence[Path], of: Plan, data: DataPlan | None
    ):
        self.overrides, self.config_dirs, self.of, self.data = list(overrides), config_dirs, of, data
        self._found: list[Advice] = []
        self._plans: dict[Change, Plan] = {}
        self._nodes: dict[str, DictConfig | None] = {}

    def advice(self) -> list[Advice]:
        """Returns changes: those that cost more, or change more, only where no others fit.

        First come those that leave the experiment what it is, then the others; of both the fastest first.
        """
        self._try(
            [*self._smaller_steps(), *self._dividing(), *((f"peft={name}",) for name in self._lighter())]
        )
        if not self._fits(keeping=True):
            self._try(self._offloading())
        if not self._fits(keeping=True):
            self._try(self._together(), ENOUGH)
        if not self._fits():
            length = int(self.of.case.cfg.data.seq_length)
            self._try((f"data.seq_length={n}",) for n in (length // 2, length // 4) if n >= SHORTEST)
        if not self._fits():
            self._try(self._lighter_together(), ENOUGH)
        return sorted(self._found, key=lambda advice: (bool(advice.effect), advice.slower(self.of)))

    def _try(self, changes: Iterable[Change], enough: float = math.inf) -> None:
        """Plans changes that were not planned yet, until so many of them fit."""
        for change in changes:
            if enough <= 0:
                return
            if change and change not in self._plans and (made := self._planned(change)):
                self._plans[change] = made
                if self._helps(made):
                    self._found.append(Advice(change, made, self._effect(change)))
                enough -= made.fits

    def _fits(self, keeping: bool = False) -> bool:
        """Whether something was found that fits; keeping: and leaves the experiment what it is."""
        return any(advice.plan.fits and not (keeping and advice.effect) for advice in self._found)

    def _helps(self, made: Plan) -> bool:
        """Whether a plan fits, or takes noticeably less of what is short."""
        of = self.of
        device = made.peak < LESS * of.peak and of.peak > of.room
        return made.fits or device or (made.on_host < LESS * of.on_host and not of.host_fits)

    def _smaller_steps(self) -> Iterator[Change]:
        """Yields fewer layers that keep what they compute, then fewer rows at a time."""
        case, of = self.of.case, self.of
        if _of_a_step(of) < (1 - LESS) * of.memory.step:
            return  # these make nothing else smaller
        yield from ((f"{SETTING}={word}",) for every, word in RECOMPUTING if _less(every, of.every))
        rows = case.sizes.per_device
        half = max((size for size in range(1, rows // 2 + 1) if rows % size == 0), default=rows)
        yield from (self._rows(fewer) for fewer in sorted({half, 1}, reverse=True) if fewer < rows)

    def _together(self) -> Iterator[Change]:
        """Yields changes at once that keep the experiment what it is."""
        if least := self._least():
            for dist in ((), *self._dividing(), *self._offloading()):
                alone = self._plans.get(dist, self.of)
                if max(alone.peak - _of_a_step(alone), alone.memory.loading) < alone.room:
                    yield (*least, *dist)

    def _lighter_together(self) -> Iterator[Change]:
        """Yields more and more changes at once that train something else."""
        least, spread = self._least(), [*self._dividing(), *self._offloading()]
        lighter = [(f"peft={name}",) for name in self._lighter()]
        last: Change = lighter[-1] if lighter else ()
        yield from ((*least, *peft) for peft in lighter if least)
        yield from ((*least, *last, *dist) for dist in spread if last)
        yield (*least, *last, *(spread[-1] if spread else ()), f"data.seq_length={SHORTEST}")

    def _least(self) -> Change:
        """Returns what a step takes the least with: all layers recomputed, one row."""
        least: Change = (f"{SETTING}=true",) if self.of.every != 1 else ()
        return least + (self._rows(1) if self.of.case.sizes.per_device > 1 else ())

    def _rows(self, rows: int) -> Change:
        """Returns the overrides for micro-batches of so many rows at the same global batch."""
        sizes, train = self.of.case.sizes, self.of.case.cfg.train
        change: Change = (f"train.per_device_batch_size={rows}",)
        if train.global_batch_size is None:
            change += (f"train.gradient_accumulation_steps={sizes.accumulation * sizes.per_device // rows}",)
        return change

    def _lighter(self) -> list[str]:
        """Returns the peft modes that need less memory."""
        return {"full": ["lora", "qlora"], "lora": ["qlora"]}.get(_name(self.of.case, "peft"), [])

    def _dividing(self) -> Iterator[Change]:
        """Yields what divides over ranks."""
        dist, now = self.of.case.parts.dist, f"dist={_name(self.of.case, 'dist')}"
        if self.of.case.world > 1:
            yield from ((name,) for name in DIVIDING if name != now)
            if now == "dist=fsdp" and not getattr(dist, "reduce_every_micro_batch", True):
                yield (REDUCING,)

    def _offloading(self) -> Iterator[Change]:
        """Yields what moves to the host, or back where that has too little memory."""
        case, now = self.of.case, f"dist={_name(self.of.case, 'dist')}"
        if not self.of.host_fits:
            moved = dict.fromkeys(key.partition("=")[0] for _, *keys in OFFLOADING for key in keys)
            yield from ((f"{key}=false",) for key in moved if OmegaConf.select(case.cfg, key))
        for name, *keys in OFFLOADING:
            if name != now:
                yield (name, *keys)
            elif off := tuple(key for key in keys if not OmegaConf.select(case.cfg, key.partition("=")[0])):
                yield off

    def _planned(self, change: Change) -> Plan | None:
        """Returns the plan of a changed config, None where it does not go together with the change."""
        try:
            if (cfg := self._changed(change)) is None:
                return None
            # nothing fits as it is, so that auto recomputes all layers there; what fits may do with fewer
            return plan(changed(self.of.case, cfg), self._data(cfg), smallest=True)
        except UserError:  # e.g. an optimizer that this dist cannot divide
            return None

    def _changed(self, change: Change) -> DictConfig | None:
        cfg = copy.deepcopy(self.of.case.cfg)
        for override in change:
            key, _, value = override.partition("=")
            if key in ("peft", "dist"):
                if (node := self._option(override)) is None:
                    return None
                OmegaConf.update(cfg, key, node, merge=False)
                cfg.choices[key] = value
            else:
                OmegaConf.update(cfg, key, OmegaConf.select(OmegaConf.from_dotlist([override]), key))
        return cfg

    def _option(self, override: str) -> DictConfig | None:
        """Returns the node that an option gives with what else the command line sets in it, None where it has
        not all these keys."""
        if override not in self._nodes:
            key = override.partition("=")[0]
            try:
                node = OmegaConf.select(composed([*self.overrides, override], self.config_dirs), key)
            except UserError:
                node = None
            self._nodes[override] = node
        return copy.deepcopy(self._nodes[override])

    def _data(self, cfg: DictConfig) -> DataPlan | None:
        """Tokens of a step are as before: what a shorter data.seq_length drops is reported separately."""
        return self.data if cfg.data.seq_length == self.of.case.cfg.data.seq_length else None

    def _effect(self, change: Change) -> str:
        keys = {override.partition("=")[0]: override.partition("=")[2] for override in change}
        effects = [f"trains adapters ({keys['peft']})"] if "peft" in keys else []
        if length := keys.get("data.seq_length"):
            effects.append(self._shortened(int(length)))
        return "; ".join(effects)

    def _shortened(self, length: int) -> str:
        case = self.of.case
        if case.parts.rows.splits_samples:
            return "cuts samples more often"
        what = "drops" if case.cfg.data.long_samples is LongSamples.drop else "cuts"
        if self.data is None:
            return f"{what} samples above {length:,} tokens"
        return f"{what} {'about ' * self.data.about}{self.data.longer(length):.1%} of the samples"


def _of_a_step(plan: Plan) -> float:
    """Returns the bytes of a peak that grow with the tokens of a micro-batch."""
    return sum(plan.memory.parts.get(name, 0.0) for name in OF_A_STEP)


def _less(every: int, than: int) -> bool:
    """Whether recomputing one of `every` layers keeps less than one of `than`, 0 = none."""
    return than == 0 or every < than


def _name(case: Case, group: str) -> str:
    component: Any = getattr(case.parts, group)
    return str(component.public_name)
