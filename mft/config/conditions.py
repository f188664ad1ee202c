"""Conditions under which a setting has no effect in a run: what the rules of `inert` are made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.errors import shortened
from mft.hardware import visible_gpus
from mft.training.profile import SKIPPED


@dataclass(frozen=True)
class Run:
    """What the rules look at."""

    cfg: DictConfig
    """Resolved and typed."""
    world: int
    """Number of ranks."""
    sweep: bool
    """Whether it is a job of a sweep."""

    def value(self, key: str) -> Any:
        """Returns the value of a key, None if there is no such key."""
        return OmegaConf.select(self.cfg, key)


Reason = Callable[[Run], str]
"""Returns why a setting has no effect in a run, "" where it has one."""


def where(holds: Callable[[Run], object], words: str) -> Reason:
    """A setting that is not read in some runs."""
    return lambda run: words if holds(run) else ""


def where_value(key: str, holds: Callable[[object], bool]) -> Reason:
    """A setting that is not read where another one has some values, which the sentence shows."""
    return lambda run: f"{key} is {shown(run.value(key))}" if holds(run.value(key)) else ""


def unless(key: str, *values: object) -> Reason:
    """A setting that is read only where another one has one of these values."""
    return where_value(key, lambda value: value not in values)


def when(key: str, *values: object) -> Reason:
    """A setting that is not read where another one has one of these values."""
    return where_value(key, lambda value: value in values)


def where_given(key: str) -> Reason:
    """A setting that another one stands in for."""
    return where(lambda run: run.value(key), f"{key} is given")


def ends_before(key: str) -> Reason:
    """An interval of more steps than the run has."""

    def reason(run: Run) -> str:
        last, interval = run.cfg.train.max_steps, run.value(key)
        return f"train.max_steps={last} ends the run first" if last and interval and interval > last else ""

    return reason


def ends_before_a_profile(run: Run) -> bool:
    last = run.cfg.train.max_steps
    return last is not None and last <= SKIPPED


def validates(run: Run) -> bool:
    return run.cfg.data.split[1] > 0 or any(task.get("valid") for task in run.cfg.task.values())


def keeps_one_checkpoint(run: Run) -> bool:
    return run.cfg.train.keep == 1 and not validates(run)  # else the best one stays beside it


def pads(run: Run) -> bool:
    return str(run.value("data.rows._target_")).endswith("Pad")


def in_length_groups(run: Run) -> bool:
    return pads(run) and run.value("data.pad_to") == "longest" and run.cfg.data.length_group > 1


def one_micro_batch(run: Run) -> bool:
    train = run.cfg.train
    return train.global_batch_size is None and train.gradient_accumulation_steps in (None, 1)


def reads_a_folder(run: Run) -> bool:
    path = run.value("model.path")
    return bool(path) and Path(path).is_dir()


def adds_no_tokens(run: Run) -> bool:
    return not (run.value("model.add_tokens") or run.value("model.add_special_tokens"))


def drops_inputs(run: Run) -> bool:
    return bool(run.value("peft.dropout")) and not run.value("peft.path")


def decomposes(run: Run) -> bool:
    return bool(run.value("peft.use_dora")) and not run.value("peft.path")


def packs_all_that_is_adapted(run: Run) -> bool:
    keeps = any(run.value(f"peft.{key}") for key in ("targets", "router", "skip_modules", "path"))
    return run.value("peft.bits") is not None and not keeps


def under_zero3(run: Run) -> bool:
    return str(run.value("dist._target_")).endswith("Zero3")


IN_A_SWEEP = where(lambda run: run.sweep, "the jobs of a sweep have folders of their own")
OUTSIDE_A_SWEEP = where(lambda run: not run.sweep, "this is one run, not a sweep (-m)")
WITHOUT_VALIDATION = where(lambda run: not validates(run), "no task has validation samples")
ONE_TASK = where(lambda run: len(run.cfg.task) + len(run.cfg.data.paths) == 1, "there is one task")
ONE_MACHINE = when("launch.nnodes", 1)
ONE_RANK = where(lambda run: run.world == 1, "the run has one rank")
INLINE = when("launch.mode", "inline")
TRACKING_URI = where(lambda run: os.environ.get("MLFLOW_TRACKING_URI"), "MLFLOW_TRACKING_URI names the store")
WITHOUT_GPU = where(lambda _: not visible_gpus(), "no GPU is visible here, and a CPU repeats itself")
ONE_BY_ONE = where(under_zero3, "dist=zero3 gathers weights module by module, so peft's own path is taken")
OF_DORA = where(decomposes, "adapters of DoRA take peft's own path")
OF_DROPOUT = where(
    lambda run: drops_inputs(run) and not visible_gpus(),
    "adapters with dropout take peft's own path on a CPU",
)
OF_PACKED = where(packs_all_that_is_adapted, "adapters of quantised layers take peft's own path")
NOT_PADDED = where(lambda run: not pads(run), "it is read by data=pad")


def shown(value: object) -> str:
    """Returns a value as it is written on the command line."""
    if OmegaConf.is_config(value):
        return shortened(OmegaConf.to_container(value), 40)
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
