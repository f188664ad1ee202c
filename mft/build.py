"""From config nodes to objects: `check` judges a composed config in the parent, `build` makes one component.

`build` is the only caller of `hydra.utils.instantiate`, and builds only targets of an allow-list.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from mft.config import batch_sizes, settled
from mft.data.settings import BadRows, LongSamples, Mixture
from mft.data.task import Task, all_tasks
from mft.dist.accelerator import refuse_fp16
from mft.errors import UserError, nearest, shortened
from mft.machine import visible_gpus
from mft.metrics import BEST

ALLOWED_TARGETS = ("mft.", "torch.optim.", "bitsandbytes.optim.")
"""Prefixes of `_target_` that may be built; `train.allow_targets` adds to them from the command line."""

COMPONENTS = ("data.rows", "model", "peft", "dist", "loss", "optimizer", "scheduler")
"""Single component nodes; every entry of `task` and `tracking` is one too."""


def component_paths(cfg: DictConfig) -> list[str]:
    """Returns the yaml paths of all component nodes, tasks first."""
    return [f"task.{name}" for name in cfg.task] + list(COMPONENTS) + [f"tracking.{name}" for name in cfg.tracking]


def component_class(node: Any, path: str, allowed: Sequence[str] = ALLOWED_TARGETS) -> type:
    """Returns the class that a component node names in `_target_`.

    Raises UserError when there is none, when it is not on the allow-list, or when it cannot be imported.
    """
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(target, str):
        raise UserError(
            f"{path} has no _target_: it names a component to build, got {shortened(node)}. {_choose(path)}"
        )
    if not target.startswith(tuple(allowed)):
        raise UserError(
            f"{path}._target_={target} may not be built: allowed are {', '.join(p + '*' for p in allowed)}; "
            f"add a prefix with train.allow_targets=[{target.split('.')[0]}.] on the command line."
        )
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}._target_={target}: there is no module {error.name}.") from error
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{path}._target_={target}: {module_name} has no {name}{nearest(name, vars(module))}")
    return found


def _choose(path: str) -> str:
    group = path.partition(".")[0]
    if group == "task":
        return "The yaml of a task begins with the line `# @package task.NAME` and holds _target_: mft.data.task.Task."
    option = f"/{group}: NAME" if group != "tracking" else "/tracking: [NAME]"
    return f"Choose one with {group}=NAME, or in a yaml with `defaults: [override {option}]`."


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
                f"{path}.{key}: {cls.__name__} has no such field{nearest(key, fields) or '.'} "
                f"Its fields: {', '.join(fields)}."
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
            raise UserError(f"{path}.{key}={shortened(value)}: {_first_line(error)}") from error


def _check_nothing_missing(node: DictConfig, path: str) -> None:
    for key in map(str, node):
        if OmegaConf.is_missing(node, key):
            raise UserError(f"{path}.{key} is missing: give it on the command line, {path}.{key}=…, or in a yaml.")


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0]
    return "must be a list, e.g. [a,b]" if "is not a ListConfig" in line else line


def resolved(cfg: DictConfig) -> DictConfig:
    """Returns the config with every interpolation replaced; UserError names the one that cannot be."""
    try:
        copy = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, structured_config_mode=SCMode.DICT))
    except MissingMandatoryValue as error:
        raise UserError(f"{_first_line(error)}.") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from error
    assert isinstance(copy, DictConfig)
    return copy


def build(node: DictConfig, path: str = "", allowed: Sequence[str] = ALLOWED_TARGETS, **runtime: Any) -> Any:
    """Instantiates a component node; nested nodes are built first. `runtime` values override the node's."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    for inner_path, inner in _nodes(node, path or "component"):
        component_class(inner, inner_path, allowed)
    try:
        return instantiate(node, **runtime, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def component(cfg: DictConfig, path: str, allow_targets: Sequence[str] = ()) -> Any:
    """Instantiates the component at a path of a config. allow_targets: prefixes of `_target_` beside ours."""
    return build(OmegaConf.select(cfg, path), path, (*ALLOWED_TARGETS, *allow_targets))


def check(cfg: DictConfig, world: int, allow_targets: Sequence[str] = ()) -> None:
    """Judges a resolved, typed config before any process starts or model loads; raises UserError with a sentence.

    Field names and types of every component come first, then what a component itself can tell (`check` methods: missing
    paths, an attention that cannot run here), then what only the whole can tell.
    """
    allowed = (*ALLOWED_TARGETS, *allow_targets)
    nodes: list[tuple[str, DictConfig]] = []
    for path in component_paths(cfg):
        node = OmegaConf.select(cfg, path)
        component_class(node, path, allowed)  # a group that was taken out or set to a value has no node below
        nodes += _nodes(node, path)
    for path, node in nodes:
        cls = component_class(node, path, allowed)
        if dataclasses.is_dataclass(cls):
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
    components = {path: build(OmegaConf.select(cfg, path), path, allowed) for path in component_paths(cfg)}
    for component in components.values():
        if hasattr(component, "check"):
            component.check()
    chosen = {name: components[f"task.{name}"] for name in cfg.task}
    tasks = all_tasks(chosen, list(cfg.data.paths))
    for task in tasks:
        task.files()  # a missing folder, a folder without rows
        task.splits()  # files for validation and test alone
        task.check_rows(stops=cfg.data.bad_rows is BadRows.error)
    _check_something_trains(tasks, cfg.data.mixture)
    _check_best(cfg.train.best, [task.name for task in tasks])
    # How many samples validate is known once they are cut; where none can be, it is known now.
    may_validate = {task.name: int(cfg.data.split[1] > 0 or "valid" in task.splits()) for task in tasks}
    check_validation(cfg.train, components["loss"], may_validate)
    if hasattr(components["dist"], "check_ranks"):
        components["dist"].check_ranks(world)
    _check_together(cfg, components)


def _check_best(best: str, names: Sequence[str]) -> None:
    allowed = [*BEST, *names]
    if best not in allowed:
        raise UserError(
            f"train.best={best}: allowed are {', '.join(BEST)} or a task ({', '.join(names)}){nearest(best, allowed)}"
        )


def check_validation(train: Any, loss: Any, counts: Mapping[str, int]) -> None:
    """Raises UserError for settings that need validation samples where there are none.

    counts: validation samples of each task, by name.
    """
    without = (
        "; give data.split a validation part, e.g. data.split=[95,5,0], or a task its own rows with task.NAME.valid"
    )
    if not any(counts.values()):
        if loss.needs_validation:
            name = type(loss).__module__.rpartition(".")[2]
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
    whole = "model.add_tokens" if components["model"].new_tokens() else peft.reads_base
    if whole and getattr(components["dist"], "divides_on_load", False):
        raise UserError(
            f"{whole} reads whole weights of the base, of which every rank has a part only under dist=zero3; choose "
            "dist=fsdp, zero2 or ddp"
        )
    _check_rows(components["data.rows"], components["loss"], cfg.data.long_samples)
    components["model"].check_rows(components["data.rows"].several)
    precision = settled(cfg.train.precision)
    refuse_fp16(precision.value, cpu=not visible_gpus())
    peft.check_with(components["model"], precision.value)
    components["model"].check_precision(precision.value)
    for name in cfg.task:
        task = components[f"task.{name}"]
        _check_share(name, task.share, cfg.data.mixture)


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
