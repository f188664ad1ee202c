"""From config nodes to objects: `check` judges a composed config in the parent, `build` makes one component.

Which classes may be named is the rule of `mft.config.components`; nothing else calls what a config names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from mft.config.components import component_class
from mft.config.other_trainers import here
from mft.config.schema import batch_sizes, settled
from mft.data.settings import BadRows, LongSamples, Mixture
from mft.data.task import Task, all_tasks
from mft.distributed.accelerator import refuse_fp16
from mft.errors import UserError, nearest, plainly, shortened
from mft.hardware import visible_gpus
from mft.optim.optimizers import Library, Optimizer
from mft.ranges import check_ranges
from mft.training.metrics import BEST

COMPONENTS = ("data.rows", "model", "peft", "dist", "loss", "optimizer", "scheduler")
"""Single component nodes; every entry of `task` and `tracking` is one too."""


def component_paths(cfg: DictConfig) -> list[str]:
    """Returns the yaml paths of all component nodes, tasks first."""
    return [f"task.{name}" for name in cfg.task] + list(COMPONENTS) + [f"tracking.{name}" for name in cfg.tracking]


def _nodes(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Yields a component node and the component nodes inside it."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in map(str, node):
            yield from _nodes(node._get_node(key), f"{path}.{key}")
    elif isinstance(node, ListConfig):
        for number in range(len(node)):
            yield from _nodes(node._get_node(number), f"{path}[{number}]")


def _check_fields(node: DictConfig, cls: type, path: str) -> None:
    """Merges the node into its class, so that unknown keys and wrong types are told by yaml path."""
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    schema = OmegaConf.structured(cls)
    for key in (str(key) for key in node if not str(key).startswith("_")):
        if key not in fields:
            raise UserError(
                f"{path}.{key}: {cls.__name__} has no such field{nearest(key, fields) or here(key) or '.'} "
                f"Fields: {', '.join(fields) or 'none'}."
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
            if isinstance(schema[key], str) and isinstance(value, int | float):
                node[key] = schema[key]  # text that looks like a number, run_name=2026
        except (ValidationError, ConfigKeyError) as error:
            raise UserError(f"{path}.{key}={shortened(value)}: {plainly(_first_line(error)).rstrip('.')}.") from error
        if isinstance(value, int | float) and type(schema[key]) is str:
            node[key] = schema[key]  # a name of digits, which yaml reads as a number


def _refuse_special_keys(node: DictConfig, path: str) -> None:
    """Raises UserError for Hydra's other keys of a component, which nothing here reads."""
    for key in map(str, node):
        if key.startswith("_") and key != "_target_":
            raise UserError(f"{path}.{key}: unexpected; a component has _target_ and the fields of its class.")


def _check_nothing_missing(node: DictConfig, path: str) -> None:
    for key in map(str, node):
        if OmegaConf.is_missing(node, key):
            raise UserError(f"{path}.{key} is missing: give it on the command line, {path}.{key}=…, or in a yaml.")


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0]
    return "must be a list, e.g. [a,b]" if "is not a ListConfig" in line else line


def build(node: DictConfig, path: str = "component", **runtime: Any) -> Any:
    """Makes a component of its node; those inside it are built first. `runtime` values override the node's."""
    cls = component_class(node, path)
    _refuse_special_keys(node, path)
    values = {str(key): _value(node[key], f"{path}.{key!s}") for key in node if key != "_target_"} | runtime
    if _of_a_library(cls, path):
        return Library(cls, values)
    given = [key for key in values if key in node and OmegaConf.is_interpolation(node, key)]
    texts = [key for key in given if isinstance(values[key], str)]
    if texts:  # what the environment holds is text; the node keeps it as it is written
        schema = OmegaConf.structured(cls)
        for key in texts:
            OmegaConf.update(schema, key, values[key], merge=False)
            values[key] = schema[key]
    return cls(**values)


def _value(value: Any, path: str) -> Any:
    """Returns a setting as a plain value, with the components in it built."""
    if isinstance(value, DictConfig):
        if "_target_" in value:
            return build(value, path)
        return {key: _value(value[key], f"{path}.{key!s}") for key in value}
    if isinstance(value, ListConfig):
        return [_value(item, f"{path}[{number}]") for number, item in enumerate(value)]
    return value


def _of_a_library(cls: type, path: str) -> bool:
    return path == "optimizer" and not issubclass(cls, Optimizer)


def component(cfg: DictConfig, path: str) -> Any:
    """Makes the component at a path of a config."""
    return build(OmegaConf.select(cfg, path), path)


def check(cfg: DictConfig, world: int) -> None:
    """Judges a resolved, typed config before any process starts or model loads; raises UserError with a sentence.

    Field names and types of every component come first, then what a component itself can tell (`check` methods: missing
    paths, an attention that cannot run here), then what only the whole can tell.
    """
    nodes: list[tuple[str, DictConfig]] = []
    for path in component_paths(cfg):
        node = OmegaConf.select(cfg, path)
        component_class(node, path)  # a group that was taken out or set to a value has no node below
        nodes += _nodes(node, path)
    for path, node in nodes:
        _refuse_special_keys(node, path)
        cls = component_class(node, path)
        if not _of_a_library(cls, path):
            _check_fields(node, cls, path)
    for path, node in nodes:
        _check_nothing_missing(node, path)
    if not cfg.task and not cfg.data.paths:
        raise UserError(
            "No task is chosen. Choose from conf/task with task=[completion,docstring] (`mft demo` makes the demo's "
            "five), or name folders of JSONL files: data.paths=[dir1,dir2]."
        )
    for settings in (cfg.train, cfg.data):
        OmegaConf.to_object(settings).check()  # type: ignore[union-attr]
    batch_sizes(cfg.train, world)
    components = {path: build(OmegaConf.select(cfg, path), path) for path in component_paths(cfg)}
    for path, component in components.items():
        if dataclasses.is_dataclass(component):
            check_ranges(component, path)
        if hasattr(component, "check"):
            component.check()
    chosen = {name: components[f"task.{name}"] for name in cfg.task}
    tasks = all_tasks(chosen, list(cfg.data.paths))
    for task in tasks:
        task.files()  # a missing folder, a folder without rows
        task.splits()  # files for validation and test alone
        task.check_rows(stops=cfg.data.bad_rows is BadRows.error)
    _check_something_trains(tasks, cfg.data.mixture)
    names = [task.name for task in tasks]
    _check_best(cfg.train.best, names)
    _check_by_task(components["loss"], names)
    # How many samples validate is known once they are cut; where none can be, it is known now.
    may_validate = {task.name: int(cfg.data.split[1] > 0 or "valid" in task.splits()) for task in tasks}
    check_validation(cfg.train, components["loss"], may_validate)
    components["dist"].check_ranks(world)
    _check_together(cfg, components)


def _check_best(best: str, names: Sequence[str]) -> None:
    allowed = [*BEST, *names]
    if best not in allowed:
        raise UserError(
            f"train.best={best}: allowed are {', '.join(BEST)} or a task ({', '.join(names)}){nearest(best, allowed)}"
        )


def _check_by_task(loss: Any, names: Sequence[str]) -> None:
    """Values of single tasks, such as loss.gamma_by_task: of tasks that exist, and numbers of at least 0."""
    for key in vars(loss):
        for name, value in (getattr(loss, key) or {}).items() if key.endswith("_by_task") else ():
            if name not in names:
                raise UserError(
                    f"loss.{key}.{name}: unknown task{nearest(name, names) or '.'} Allowed: {', '.join(names)}."
                )
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise UserError(f"loss.{key}.{name}={value} must be at least 0 and finite.")


def check_validation(train: Any, loss: Any, counts: Mapping[str, int]) -> None:
    """Raises UserError for settings that need validation samples where there are none.

    counts: validation samples of each task, by name.
    """
    without = (
        "; give data.split a validation part, e.g. data.split=[95,5,0], or a task its own rows with task.NAME.valid"
    )
    if not any(counts.values()):
        if loss.needs_validation:
            name = loss.public_name or type(loss).__name__
            raise UserError(f"loss={name} learns its weights from validation samples, and no task has any{without}")
        if train.early_stopping:
            raise UserError(f"train.early_stopping=true needs validation samples, and no task has any{without}")
    if train.best in counts and train.best not in BEST and not counts[train.best]:
        raise UserError(f"train.best={train.best}: this task has no validation samples{without}")


def _check_together(cfg: DictConfig, components: dict[str, Any]) -> None:
    """What no single component can judge."""
    optimizer, scheduler, peft = components["optimizer"], components["scheduler"], components["peft"]
    lr = learning_rate(optimizer, peft)
    scheduler.lr(1, 2, lr)  # a min_lr above the learning rate is refused here
    whole = "model.add_tokens" if components["model"].new_tokens() else peft.full_weights_reason
    if whole and components["dist"].divides_on_load:
        raise UserError(
            f"{whole} reads whole weights of the base, of which every rank has a part only under dist=zero3; choose "
            "dist=fsdp, zero2 or ddp"
        )
    _check_dist(components["dist"], optimizer, peft, settled(cfg.train.precision).value)
    _check_rows(components["data.rows"], components["loss"], cfg.data.long_samples)
    components["model"].check_rows(components["data.rows"].several)
    precision = settled(cfg.train.precision)
    refuse_fp16(precision.value, cpu=not visible_gpus())
    peft.check_against(components["model"], precision.value)
    components["model"].check_precision(precision.value)
    for name in cfg.task:
        task = components[f"task.{name}"]
        _check_share(name, task.share, cfg.data.mixture)


def _check_dist(dist: Any, optimizer: Any, peft: Any, precision: str) -> None:
    if getattr(dist, "divides_into_dtensors", False) and not getattr(optimizer, "takes_dtensors", True):
        raise UserError(
            "optimizer=adamw8bit: bitsandbytes cannot update what dist=fsdp divides over ranks; choose "
            "optimizer=adamw, or dist=ddp"
        )
    stored = getattr(peft, "storage_dtype", "uint8")
    if getattr(dist, "casts_weights", False) and precision != "fp32" and stored not in ("uint8", precision):
        raise UserError(
            f"peft.storage_dtype={stored}: this dist casts weights to {precision}, packed ones by value, which would "
            f"destroy them; choose peft.storage_dtype={precision} or uint8"
        )


def _check_rows(rows: Any, loss: Any, long_samples: LongSamples) -> None:
    if rows.cuts_samples and loss.by_sample:
        raise UserError(
            f"loss: {type(loss).__name__} counts whole samples, but the rows of data=concat cut them; choose a mode "
            "that counts tokens, e.g. loss=token_mean or loss=task_token_mean, or data=pack."
        )
    if long_samples is LongSamples.keep and not rows.cuts_samples:
        raise UserError(
            "data.long_samples=keep is for rows that cut samples (data=concat); choose drop, truncate_left, "
            "truncate_right, split_turns or error."
        )


def _check_something_trains(tasks: Sequence[Task], mixture: Mixture) -> None:
    """Raises UserError where every task has a share or a weight of 0."""
    trained = [task for task in tasks if mixture is not Mixture.shares or task.share != 0]
    if not trained:
        keys = ", ".join(f"task.{task.name}.share" for task in tasks)
        raise UserError(f"{keys}: all are 0, so no task would be trained; one must be above 0.")
    if not any(task.weight for task in trained):
        keys = ", ".join(f"task.{task.name}.weight" for task in trained)
        raise UserError(f"{keys}: all are 0, so nothing would be trained; one must be above 0.")


def _check_share(name: str, share: float | None, mixture: Mixture) -> None:
    if share is None:
        return
    if not (share >= 0 and math.isfinite(share)):
        raise UserError(f"task.{name}.share={share} is no part of a mixture: a number, 0 or more, or null.")
    if mixture is not Mixture.shares:
        raise UserError(
            f"task.{name}.share={share:g} does nothing with data.mixture={mixture.value}; choose data.mixture=shares."
        )


def learning_rate(optimizer: Any, peft: Any) -> float:
    """Returns optimizer.lr, or the default of the peft mode where it is null."""
    return optimizer.base_lr(peft.default_lr)
