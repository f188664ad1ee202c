"""Settings that the user set but that have no effect in this run: a table of rules with their reasons."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.config.inputs import SETTINGS, under
from mft.config.overrides import key_of
from mft.config.schema import config_dir
from mft.errors import shortened
from mft.hardware import visible_gpus


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

RULES: tuple[tuple[str, tuple[Reason, ...]], ...] = (
    ("train.early_stopping_stall_num", (unless("train.early_stopping", True),)),
    ("train.deterministic", (WITHOUT_GPU,)),
    ("train.prompts_max_new_tokens", (when("train.prompts", None),)),
    ("launch.prune", (OUTSIDE_A_SWEEP, WITHOUT_VALIDATION)),
    ("launch.prune_after", (OUTSIDE_A_SWEEP, unless("launch.prune", True), WITHOUT_VALIDATION)),
    ("launch.fail_fast sweep", (OUTSIDE_A_SWEEP,)),
    ("train.resume output_dir", (IN_A_SWEEP,)),
    ("train.eval_every", (WITHOUT_VALIDATION, ends_before("train.eval_every"))),
    ("train.eval_at_start train.eval_samples train.per_device_eval_batch_size", (WITHOUT_VALIDATION,)),
    ("train.best train.keep_task_best", (WITHOUT_VALIDATION,)),
    ("train.save_state", (where(keeps_one_checkpoint, "train.keep=1 keeps one checkpoint"),)),
    ("train.save_every", (ends_before("train.save_every"),)),
    ("train.log_every", (ends_before("train.log_every"),)),
    ("launch.jobs", (OUTSIDE_A_SWEEP, INLINE)),
    ("launch.shutdown_seconds", (INLINE,)),
    ("launch.main_address launch.node_rank launch.rdzv_endpoint launch.local_addr", (ONE_MACHINE,)),
    ("launch.join_seconds launch.lost_seconds", (ONE_MACHINE,)),
    ("launch.main_port", (ONE_MACHINE, when("launch.main_address", None))),
    ("data.pad_to", (NOT_PADDED,)),
    ("data.length_group", (NOT_PADDED, when("data.pad_to", "seq_length"))),
    ("data.window", (where(in_length_groups, "data=pad makes windows of 50 x data.length_group samples"),)),
    ("data.mixture task.*.weight", (ONE_TASK,)),
    ("data.mixture_by", (when("data.mixture", "natural"),)),
    ("data.mixture_temperature", (unless("data.mixture", "temperature"),)),
    ("model.revision", (where(reads_a_folder, "model.path is a folder"),)),
    ("model.pad_to_multiple_of", (where(adds_no_tokens, "model.add_tokens is empty"),)),
    (
        "peft.rank peft.alpha peft.dropout peft.targets peft.experts peft.router peft.modules_to_save "
        "peft.use_dora peft.use_rslora peft.init",
        (where_given("peft.path"),),
    ),
    ("peft.fused", (ONE_BY_ONE, OF_DORA, OF_DROPOUT, OF_PACKED)),
    ("peft.quant_type peft.double_quant peft.compute_dtype peft.storage_dtype", (when("peft.bits", 8),)),
    ("loss.probe_samples", (when("loss.source", "train"),)),
    (
        "dist.find_unused_parameters dist.overlap_comm dist.reduce_bucket_size dist.allgather_bucket_size "
        "dist.prefetch_bucket_size dist.persistence_threshold dist.timeout_minutes",
        (ONE_RANK,),
    ),
    ("dist.reduce_every_micro_batch", (ONE_RANK, where(one_micro_batch, "a step has one micro-batch"))),
    ("tracking.mlflow.store", (where_given("tracking.mlflow.uri"), TRACKING_URI)),
    ("choices", (where(lambda _: True, "it is filled in by mft"),)),
)
"""Keys (`*`: every task) → reasons for which they may have no effect; the first that holds is reported."""


def without_effect(cfg: DictConfig, world: int, given: Sequence[str], sweep: bool = False) -> list[str]:
    """Returns a sentence for every setting among `given` keys that differs from its default and has no
    effect.

    cfg: resolved and typed; world: number of ranks; given: keys set by the person; sweep: whether it is a job
    of one.
    """
    run, notes = Run(cfg, world, sweep), []
    for key, reasons in rules(cfg.task):
        # Whoever repeats a default asks for nothing.
        if not under(key, given) or OmegaConf.select(cfg, key) is None or _is_default(cfg, key):
            continue
        if reason := next(filter(None, (reason(run) for reason in reasons)), ""):
            notes.append(f"{key}={shown(run.value(key))} has no effect: {reason}.")
    if not sweep and (note := _peak_not_reached(run)) and under("scheduler.warmup", given):
        notes.append(note)
    return notes


def rules(tasks: Iterable[object]) -> Iterator[tuple[str, tuple[Reason, ...]]]:
    """Yields every key that may have no effect, those of each task included, with its reasons."""
    for keys, reasons in RULES:
        for key in keys.split():
            for name in tasks if "*" in key else ("",):
                yield key.replace("*", str(name)), reasons


def _peak_not_reached(run: Run) -> str:
    warmup, last = run.value("scheduler.warmup"), run.cfg.train.max_steps
    if not (warmup and last and warmup >= 1 and warmup > last):
        return ""
    return (
        f"scheduler.warmup={warmup:g}: the learning rate does not reach its peak by train.max_steps={last}."
    )


def _is_default(cfg: DictConfig, key: str) -> bool:
    """Whether a value is what it is without anybody setting it: of a settings class, or of the chosen
    option's yaml."""
    group, _, name = key.partition(".")
    value = OmegaConf.select(cfg, key)
    if group in SETTINGS:
        default = next(field.default for field in dataclasses.fields(SETTINGS[group]) if field.name == name)
        return bool(value == default)
    path = config_dir() / group / f"{cfg.choices.get(group)}.yaml"
    return path.is_file() and name != "" and bool(OmegaConf.select(_with_bases(path), name) == value)


def _with_bases(path: Path) -> DictConfig:
    """Returns the values of an option's yaml over those of the yamls beside it that its defaults list
    names."""
    own = OmegaConf.load(path)
    assert isinstance(own, DictConfig)
    names = [name for name in own.pop("defaults", ()) if isinstance(name, str) and name != "_self_"]
    bases = [_with_bases(path.with_name(f"{name}.yaml")) for name in names]
    merged = OmegaConf.merge(*bases, own)
    assert isinstance(merged, DictConfig)
    return merged


def given_keys(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> list[str]:
    """Returns the keys that a person set: in overrides, and in their own yaml files that these choose."""
    keys = [key_of(o) for o in overrides]
    for override in overrides:
        group, _, options = override.lstrip("+~").partition("=")
        for option in options.strip("[]").split(","):
            for folder in config_dirs:
                path = folder / group / f"{option}.yaml"
                keys += _keys_of_yaml(path, group) if path.is_file() else []
    return keys


def _keys_of_yaml(path: Path, group: str) -> list[str]:
    header, _, package = path.read_text(encoding="utf-8").partition("\n")[0].partition("@package")
    prefix = package.strip() if header.strip() == "#" and package else group.replace("/", ".")
    loaded = OmegaConf.load(path)
    keys = _leaves(OmegaConf.to_container(loaded)) if isinstance(loaded, DictConfig) else []
    return keys if prefix == "_global_" else [f"{prefix}.{key}" for key in keys]


def _leaves(values: object, prefix: str = "") -> list[str]:
    if not isinstance(values, Mapping):
        return [prefix.removesuffix(".")]
    return [leaf for key, value in values.items() for leaf in _leaves(value, f"{prefix}{key}.")]


def shown(value: object) -> str:
    """Returns a value as it is written on the command line."""
    if OmegaConf.is_config(value):
        return shortened(OmegaConf.to_container(value), 40)
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
