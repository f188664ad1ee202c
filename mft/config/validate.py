"""Checks of a config before any process starts or model loads: fields, values, and what must fit together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from mft.config import build
from mft.config.components import component_class
from mft.config.other_trainers import setting_here
from mft.config.refusals import ended, plainly
from mft.config.schema import batch_sizes, resolve_precision
from mft.data.prompts import read_prompts
from mft.data.settings import BadRows, LongSamples, Mixture
from mft.data.task import Task
from mft.distributed.accelerator import refuse_fp16
from mft.errors import UserError, check_ranges, nearest, shortened
from mft.hardware import visible_gpus
from mft.objective import BEST

if TYPE_CHECKING:
    from mft.data.packing import RowBuilder
    from mft.loss.base import TaskLoss
    from mft.training.settings import TrainSettings


def check(cfg: DictConfig, world: int, elsewhere: bool = False) -> build.Components:
    """Judges a resolved, typed config before any process starts or model loads, and returns its components.

    elsewhere: it will run on another machine, so that neither weights nor tasks have to be here yet, and what
    this machine computes in does not matter. Raises UserError with a sentence for the first thing that is
    wrong.

    Field names and types of every component come first, then what a component itself can tell (`check`
    methods: missing paths, an attention that cannot run here), then what only the whole can tell.
    """
    nodes: list[tuple[str, DictConfig]] = []
    for path in build.component_paths(cfg):
        node = OmegaConf.select(cfg, path)
        component_class(node, path)  # raises for a group that was removed or set to a plain value
        nodes += _nodes(node, path)
    # All names and types before any missing value: a misspelt key is the likely cause of a missing one.
    for path, node in nodes:
        _check_fields(node, path)
    for path, node in nodes:
        for key in map(str, node):
            if OmegaConf.is_missing(node, key):
                raise UserError(f"{path}.{key} is missing; write {path}.{key}=…, or set it in a yaml.")
    if not cfg.task and not cfg.data.paths and not elsewhere:
        raise UserError(
            "No task is chosen. Choose from conf/task with task=[completion,docstring] (`mft demo` makes "
            "the demo's five), or name folders of JSONL files: data.paths=[dir1,dir2]."
        )
    for settings in (cfg.train, cfg.data):
        OmegaConf.to_object(settings).check()  # type: ignore[union-attr]
    if cfg.train.prompts:
        read_prompts(Path(cfg.train.prompts))
    batch_sizes(cfg.train, world)
    components = build.build_components(cfg)
    for path, component in components.by_path.items():
        if dataclasses.is_dataclass(component):
            check_ranges(component, path)
        if elsewhere and component is components.model:
            components.model.check_without_weights()
        elif hasattr(component, "check"):
            component.check()
    for task in components.tasks:
        task.files()  # a missing folder, a folder without rows
        task.splits()  # files for validation and test alone
        task.check_rows(stops=cfg.data.bad_rows is BadRows.error)
    if components.tasks:
        _check_something_trains(components.tasks, cfg.data.mixture)
    names = [task.name for task in components.tasks]
    if (best := cfg.train.best) not in (allowed := [*BEST, *names]):
        hint = nearest(best, allowed) or "."
        raise UserError(f"train.best={best}: not a criterion or a task{hint} Allowed: {', '.join(allowed)}.")
    _check_by_task(components.loss, names)
    # How many samples validate is known once they are cut; where none can be, it is known now.
    may_validate = {
        task.name: int(cfg.data.split[1] > 0 or "valid" in task.splits()) for task in components.tasks
    }
    if components.tasks:
        check_validation(cfg.train, components.loss, may_validate)
    components.dist.check_ranks(world)
    _check_together(cfg, components, cpu=not elsewhere and not visible_gpus())
    return components


def _nodes(node: object, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Yields a component node and the component nodes inside it."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in map(str, node):
            yield from _nodes(node._get_node(key), f"{path}.{key}")
    elif isinstance(node, ListConfig):
        for number in range(len(node)):
            yield from _nodes(node._get_node(number), f"{path}[{number}]")


def _check_fields(node: DictConfig, path: str) -> None:
    """Merges the node into its class, so that unknown keys and wrong types are reported by yaml path."""
    build.refuse_special_keys(node, path)
    cls = component_class(node, path)
    if build.is_of_a_library(cls, path):
        return
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    schema = OmegaConf.structured(cls)
    for key in (str(key) for key in node if not str(key).startswith("_")):
        if key not in fields:
            ours = setting_here(key)
            hint = nearest(key, fields) or (f"; did you mean {ours}?" if ours else ".")
            raise UserError(
                f"{path}.{key}: {cls.__name__} has no such field{hint} Fields: {', '.join(fields) or 'none'}."
            )
        if OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig) and "_target_" in value:
            continue  # a component inside; checked on its own
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value)
        try:
            OmegaConf.update(schema, key, value, merge=False)
        except (ValidationError, ConfigKeyError) as error:
            reason = ended(plainly(str(error).strip().splitlines()[0]))
            raise UserError(f"{path}.{key}={shortened(value)}: {reason}") from error
        if isinstance(value, int | float) and type(schema[key]) is str:
            node[key] = schema[key]  # a name of digits, such as run_name=2026, which yaml reads as a number


def _check_by_task(loss: TaskLoss, names: Sequence[str]) -> None:
    """Values of single tasks, such as loss.gamma_by_task: of tasks that exist, and numbers of at least 0."""
    for key in vars(loss):
        for name, value in (getattr(loss, key) or {}).items() if key.endswith("_by_task") else ():
            if name not in names:
                raise UserError(
                    f"loss.{key}.{name}: unknown task{nearest(name, names) or '.'} Allowed: "
                    f"{', '.join(names)}."
                )
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise UserError(f"loss.{key}.{name}={value} must be at least 0 and finite.")


def check_validation(train: TrainSettings, loss: TaskLoss, counts: Mapping[str, int]) -> None:
    """Raises UserError for settings that need validation samples where there are none.

    counts: validation samples of each task, by name.
    """
    if loss.needs_validation and not any(counts.values()):
        name = loss.public_name or type(loss).__name__
        problem = f"loss={name} learns its weights from validation samples, and no task has any"
    elif train.early_stopping and not any(counts.values()):
        problem = "train.early_stopping=true needs validation samples, and no task has any"
    elif train.best in counts and train.best not in BEST and not counts[train.best]:
        problem = f"train.best={train.best}: this task has no validation samples"
    else:
        return
    raise UserError(
        f"{problem}; give data.split a validation part, such as data.split=[95,5,0], or a task its own rows "
        "with task.NAME.valid"
    )


def _check_together(cfg: DictConfig, c: build.Components, cpu: bool) -> None:
    """Cross-component checks: what no single component can judge. cpu: whether it will run on a CPU."""
    c.scheduler.lr(1, 2, c.base_lr)  # a min_lr above the learning rate is refused here
    reads_all_of = "model.add_tokens" if c.model.new_tokens() else c.peft.full_weights_reason
    if reads_all_of and c.dist.divides_on_load:
        raise UserError(
            f"{reads_all_of} reads whole weights of the base, of which every rank has a part only under "
            "dist=zero3; choose dist=fsdp, zero2 or ddp."
        )
    precision = resolve_precision(cfg.train.precision).value
    _check_dist(c, precision)
    _check_rows(c.rows, c.loss, cfg.data.long_samples)
    c.model.check_rows(c.rows.packs_samples)
    refuse_fp16(precision, cpu=cpu)
    c.peft.check_against(c.model, precision)
    c.model.check_precision(precision)
    for name, task in c.named_tasks.items():
        if task.share is not None and cfg.data.mixture is not Mixture.shares:
            raise UserError(
                f"task.{name}.share={task.share:g} does nothing with data.mixture={cfg.data.mixture.value}; "
                "choose data.mixture=shares."
            )


def _check_dist(c: build.Components, precision: str) -> None:
    if c.dist.divides_into_dtensors:
        c.optimizer.refuse_dtensors()
    if getattr(c.peft, "bits", None) == 8 and "weights" in c.dist.divided_parts():
        raise UserError(
            "peft.bits=8: bitsandbytes keeps whole 8-bit weights, which this dist cannot divide over ranks; "
            "choose peft.bits=4, or dist=zero2 or ddp"
        )
    cast_to = c.dist.casts_weights_to(precision)
    if cast_to in (None, "fp32"):
        return
    stored = c.peft.stored_as(c.model, cast_to)
    kept = stored == "uint8" and not c.dist.casts_whole_numbers()
    if stored and stored != precision and not kept:
        of_setting = stored == getattr(c.peft, "storage_dtype", None)  # else the checkpoint is packed already
        packed = f"model.path: its 4-bit weights are stored as {stored}"
        where = f"peft.storage_dtype={stored}" if of_setting else packed
        remedy = f"peft.storage_dtype={precision}, or null" if of_setting else "dist=ddp"
        raise UserError(
            f"{where}: this dist casts weights to {precision}, packed ones by value, "
            f"which would destroy them; choose {remedy}"
        )


def _check_rows(rows: RowBuilder, loss: TaskLoss, long_samples: LongSamples) -> None:
    if rows.splits_samples and loss.by_sample:
        raise UserError(
            f"loss: {type(loss).__name__} counts whole samples, but the rows of data=concat cut them; "
            "choose a mode that counts tokens, e.g. loss=token_mean or loss=task_token_mean, or data=pack."
        )
    if long_samples is LongSamples.keep and not rows.splits_samples:
        raise UserError(
            "data.long_samples=keep is for rows that cut samples (data=concat); choose drop, truncate_left, "
            "truncate_right, split_turns or error."
        )


def _check_something_trains(tasks: Sequence[Task], mixture: Mixture) -> None:
    """Raises UserError where every task has a share or a weight of 0."""
    trained = [task for task in tasks if mixture is not Mixture.shares or task.share != 0]
    if not any(task.weight for task in trained):
        keys = [f"task.{task.name}.weight" for task in trained] or [f"task.{t.name}.share" for t in tasks]
        raise UserError(f"{', '.join(keys)}: all are 0, so nothing would be trained; one must be above 0.")
