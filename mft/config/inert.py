"""Settings that a person gave and that have no effect beside the others: a table of rules, each with its
reason."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.config.inputs import under
from mft.config.overrides import key_of
from mft.config.schema import Launch, config_dir
from mft.data.settings import DataSettings
from mft.errors import shortened
from mft.training.settings import TrainSettings


@dataclass(frozen=True)
class Run:
    """What the rules look at. cfg: resolved; world: ranks; sweep: whether it is a job of one."""

    cfg: DictConfig
    world: int
    sweep: bool = False

    def value(self, key: str) -> Any:
        """Returns the value of a key, None where there is no such key."""
        value = OmegaConf.select(self.cfg, key)
        return value.value if isinstance(value, Enum) else value

    @property
    def tasks(self) -> int:
        return len(self.cfg.task) + len(self.cfg.data.paths)

    @property
    def validates(self) -> bool:
        return self.cfg.data.split[1] > 0 or any(task.get("valid") for task in self.cfg.task.values())


Reason = Callable[[Run], str]
"""Returns why a setting has no effect in a run, "" where it has one."""


def unless(key: str, *wanted: Any) -> Reason:
    """A setting that is read only where another one has one of these values."""
    return lambda run: "" if run.value(key) in wanted else f"{key} is {shown(run.value(key))}"


def when(key: str, *values: Any) -> Reason:
    """A setting that is not read where another one has one of these values."""
    return lambda run: f"{key} is {shown(run.value(key))}" if run.value(key) in values else ""


def where_null(key: str) -> Reason:
    """A setting that is read only where another one is given."""
    return lambda run: f"{key} is null" if run.value(key) is None else ""


def where_given(key: str) -> Reason:
    """A setting that another one stands in for."""
    return lambda run: f"{key} is given" if run.value(key) else ""


def rows_are_not(name: str) -> Reason:
    """A setting that one way of making rows reads."""
    return lambda run: (
        ""
        if str(run.value("data.rows._target_")).endswith(name.capitalize())
        else f"it is read by data={name}"
    )


def in_a_sweep(run: Run) -> str:
    return "the jobs of a sweep have folders of their own" if run.sweep else ""


def outside_a_sweep(run: Run) -> str:
    return "" if run.sweep else "this is one run, not a sweep (-m)"


def without_validation(run: Run) -> str:
    return "" if run.validates else "no task has validation samples"


def one_task(run: Run) -> str:
    return "there is one task" if run.tasks == 1 else ""


def one_machine(run: Run) -> str:
    return "launch.nnodes is 1" if run.cfg.launch.nnodes == 1 else ""


def one_rank(run: Run) -> str:
    return "the run has one rank" if run.world == 1 else ""


def one_micro_batch(run: Run) -> str:
    train = run.cfg.train
    one = train.global_batch_size is None and train.gradient_accumulation_steps in (None, 1)
    return "a step has one micro-batch" if one else ""


def ends_before(key: str) -> Reason:
    """An interval of more steps than the run has."""

    def reason(run: Run) -> str:
        last, interval = run.cfg.train.max_steps, run.value(key)
        return f"train.max_steps={last} ends the run first" if last and interval and interval > last else ""

    return reason


def grouped(run: Run) -> str:
    groups = (
        not rows_are_not("pad")(run)
        and run.value("data.pad_to") == "longest"
        and run.cfg.data.length_group > 1
    )
    return "data=pad makes windows of 50 x data.length_group samples" if groups else ""


def local_folder(run: Run) -> str:
    return (
        "model.path is a folder" if run.value("model.path") and Path(run.value("model.path")).is_dir() else ""
    )


def tracking_uri_in_environment(run: Run) -> str:
    return "MLFLOW_TRACKING_URI names the store" if os.environ.get("MLFLOW_TRACKING_URI") else ""


def no_new_tokens(run: Run) -> str:
    new = run.value("model.add_tokens") or run.value("model.add_special_tokens")
    return "" if new else "model.add_tokens is empty"


EIGHT_BITS = when("peft.bits", 8)

RULES: tuple[tuple[str, tuple[Reason, ...]], ...] = (
    ("train.early_stopping_stall_num", (unless("train.early_stopping", True),)),
    ("train.prompts_max_new_tokens", (where_null("train.prompts"),)),
    ("launch.prune", (outside_a_sweep, without_validation)),
    ("launch.prune_after", (outside_a_sweep, unless("launch.prune", True), without_validation)),
    ("launch.fail_fast", (outside_a_sweep,)),
    ("train.resume", (in_a_sweep,)),
    ("train.eval_every", (without_validation, ends_before("train.eval_every"))),
    ("train.eval_at_start", (without_validation,)),
    ("train.eval_samples", (without_validation,)),
    ("train.per_device_eval_batch_size", (without_validation,)),
    ("train.best", (without_validation,)),
    ("train.keep_task_best", (without_validation,)),
    ("train.save_every", (ends_before("train.save_every"),)),
    ("train.log_every", (ends_before("train.log_every"),)),
    ("launch.jobs", (outside_a_sweep, when("launch.mode", "inline"))),
    ("launch.shutdown_seconds", (when("launch.mode", "inline"),)),
    ("launch.main_address", (one_machine,)),
    ("launch.main_port", (one_machine, where_null("launch.main_address"))),
    ("launch.node_rank", (one_machine,)),
    ("launch.rdzv_endpoint", (one_machine,)),
    ("launch.local_addr", (one_machine,)),
    ("launch.join_seconds", (one_machine,)),
    ("launch.lost_seconds", (one_machine,)),
    ("data.pad_to", (rows_are_not("pad"),)),
    ("data.length_group", (rows_are_not("pad"), when("data.pad_to", "seq_length"))),
    ("data.window", (grouped,)),
    ("data.mixture", (one_task,)),
    ("data.mixture_by", (when("data.mixture", "natural"),)),
    ("data.mixture_temperature", (unless("data.mixture", "temperature"),)),
    ("task.*.weight", (one_task,)),
    ("model.revision", (local_folder,)),
    ("model.pad_to_multiple_of", (no_new_tokens,)),
    *(
        (f"peft.{name}", (where_given("peft.path"),))
        for name in (
            *("rank", "alpha", "dropout", "targets", "experts", "router"),
            *("modules_to_save", "use_dora", "use_rslora", "init"),
        )
    ),
    *(
        (f"peft.{name}", (EIGHT_BITS,))
        for name in ("quant_type", "double_quant", "compute_dtype", "storage_dtype")
    ),
    ("loss.probe_samples", (when("loss.source", "train"),)),
    ("dist.find_unused_parameters", (one_rank,)),
    ("dist.reduce_every_micro_batch", (one_rank, one_micro_batch)),
    ("dist.overlap_comm", (one_rank,)),
    ("dist.reduce_bucket_size", (one_rank,)),
    ("dist.allgather_bucket_size", (one_rank,)),
    ("dist.prefetch_bucket_size", (one_rank,)),
    ("dist.persistence_threshold", (one_rank,)),
    ("tracking.mlflow.store", (where_given("tracking.mlflow.uri"), tracking_uri_in_environment)),
    ("output_dir", (in_a_sweep,)),
    ("sweep", (outside_a_sweep,)),
    ("choices", (lambda run: "it is filled in by mft",)),
)
"""Key (`*`: every task) → reasons for which it may have no effect; the first that holds is reported."""


def without_effect(cfg: DictConfig, world: int, given: Sequence[str], sweep: bool = False) -> list[str]:
    """Returns a sentence for every setting among `given` keys that differs from its default and has no
    effect.

    cfg: resolved and typed; world: number of ranks; given: keys set by the person; sweep: whether it is a job
    of one.
    """
    run, notes = Run(cfg, world, sweep), []
    for key, reasons in _rules(run):
        if not under(key, given) or OmegaConf.select(cfg, key) is None or _is_default(cfg, key):
            continue
        if reason := next((said for reason in reasons if (said := reason(run))), ""):
            notes.append(f"{key}={shown(run.value(key))} has no effect: {reason}.")
    if not sweep and (note := _peak_not_reached(run)) and under("scheduler.warmup", given):
        notes.append(note)
    return notes


def _rules(run: Run) -> Iterator[tuple[str, tuple[Reason, ...]]]:
    for key, reasons in RULES:
        names = run.cfg.task if "*" in key else ("",)
        for name in names:
            yield key.replace("*", str(name)), reasons


def _peak_not_reached(run: Run) -> str:
    warmup, last = run.value("scheduler.warmup"), run.cfg.train.max_steps
    if not (warmup and last and warmup >= 1 and warmup > last):
        return ""
    return f"scheduler.warmup={warmup:g}: the learning rate does not reach its peak in train.max_steps={last} steps."


def _is_default(cfg: DictConfig, key: str) -> bool:
    """Whether a value is what it is without anybody setting it: of a settings class, or of the chosen
    option's yaml."""
    group, _, name = key.partition(".")
    settings = {"train": TrainSettings, "launch": Launch, "data": DataSettings}.get(group)
    value = OmegaConf.select(cfg, key)
    if settings is not None:
        default = next(field.default for field in dataclasses.fields(settings) if field.name == name)
        return value == default or (isinstance(value, Enum) and value.value == default)
    option = cfg.choices.get(group)
    path = config_dir() / group / f"{option}.yaml"
    return path.is_file() and name != "" and OmegaConf.select(_with_bases(path), name) == value


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
    """Returns the keys that a person set: in overrides, and in the yamls of their own that these choose."""
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


def _leaves(values: Any, prefix: str = "") -> list[str]:
    if not isinstance(values, Mapping):
        return [prefix.removesuffix(".")]
    return [leaf for key, value in values.items() for leaf in _leaves(value, f"{prefix}{key}.")]


def shown(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    if OmegaConf.is_config(value):
        return shortened(OmegaConf.to_container(value), 40)
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
