"""From config nodes to objects: `build` makes one component, `build_components` all of a run.

Which classes may be named is the rule of `mft.config.components`; nothing else calls what a config names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from mft.config.components import component_class
from mft.data.task import Task, all_tasks
from mft.errors import UserError
from mft.optim.optimizers import Library, Optimizer

if TYPE_CHECKING:
    from mft.data.packing import RowBuilder
    from mft.distributed.engine import Backend
    from mft.loss.base import TaskLoss
    from mft.model.causal_lm import CausalLM
    from mft.model.peft.full import Full
    from mft.optim.schedules import Schedule
    from mft.tracking.base import Tracker

COMPONENTS = ("data.rows", "model", "peft", "dist", "loss", "optimizer", "scheduler")
"""Single component nodes; every entry of `task` and `tracking` is one too."""


def component_paths(cfg: DictConfig) -> list[str]:
    """Returns the yaml paths of all component nodes, tasks first."""
    tasks, trackers = [f"task.{name}" for name in cfg.task], [f"tracking.{name}" for name in cfg.tracking]
    return [*tasks, *COMPONENTS, *trackers]


def refuse_special_keys(node: DictConfig, path: str) -> None:
    """Raises UserError for Hydra's other keys of a component, which nothing here reads."""
    for key in map(str, node):
        if key.startswith("_") and key != "_target_":
            raise UserError(f"{path}.{key}: unexpected; a component has _target_ and its class's fields.")


def build(node: DictConfig, path: str = "component", **runtime: Any) -> Any:
    """Makes a component of its node; those inside it are built first. `runtime` values override the
    node's."""
    cls = component_class(node, path)
    refuse_special_keys(node, path)  # _args_, _partial_, … of hydra.utils.instantiate
    values = {str(key): _value(node[key], f"{path}.{key!s}") for key in node if key != "_target_"} | runtime
    if is_of_a_library(cls, path):
        return Library(cls, values)
    # What the environment holds is text; the node keeps it as it is written, the class gets it typed.
    from_environment = [key for key in values if key in node and OmegaConf.is_interpolation(node, key)]
    schema: Any = OmegaConf.structured(cls) if from_environment else None
    for key in from_environment:
        if isinstance(values[key], str):
            OmegaConf.update(schema, key, values[key], merge=False)
            values[key] = schema[key]
    return cls(**values)


def _value(value: object, path: str) -> Any:
    """Returns a setting as a plain value, with the components in it built."""
    if isinstance(value, DictConfig):
        if "_target_" in value:
            return build(value, path)
        return {key: _value(value[key], f"{path}.{key!s}") for key in value}
    if isinstance(value, ListConfig):
        return [_value(item, f"{path}[{number}]") for number, item in enumerate(value)]
    return value


def is_of_a_library(cls: type, path: str) -> bool:
    return path == "optimizer" and not issubclass(cls, Optimizer)


@dataclass(frozen=True)
class Components:
    """All components of a run, built once from its config."""

    named_tasks: dict[str, Task]
    """Those of the config group `task`, by key."""
    tasks: list[Task]
    """All tasks in the order of their numbers: the named ones, then one for each of data.paths; [] where a
    config has none yet."""
    rows: RowBuilder
    """How samples become rows of a batch: data.rows."""
    model: CausalLM
    peft: Full
    """Full fine-tuning, or a subclass that adds adapters."""
    dist: Backend
    loss: TaskLoss
    optimizer: Optimizer | Library
    """Library: a class of torch or bitsandbytes, which has no contract of ours."""
    scheduler: Schedule
    trackers: list[Tracker]
    """Those of the config group `tracking`, in the order in which they were chosen."""
    by_path: dict[str, Any]
    """The same by yaml path, e.g. `task.docs`, `data.rows`, `tracking.mlflow`."""

    @property
    def base_lr(self) -> float:
        """optimizer.lr, or the default of the peft mode where it is null."""
        lr: float = self.optimizer.base_lr(self.peft.default_lr)
        return lr


def build_components(cfg: DictConfig) -> Components:
    """Makes all components of a config; raises UserError where two tasks have one name."""
    by_path = {path: component(cfg, path) for path in component_paths(cfg)}
    named_tasks = {str(name): by_path[f"task.{name}"] for name in cfg.task}
    return Components(
        named_tasks=named_tasks,
        tasks=all_tasks(named_tasks, list(cfg.data.paths)) if named_tasks or cfg.data.paths else [],
        rows=by_path["data.rows"],
        model=by_path["model"],
        peft=by_path["peft"],
        dist=by_path["dist"],
        loss=by_path["loss"],
        optimizer=by_path["optimizer"],
        scheduler=by_path["scheduler"],
        trackers=[by_path[f"tracking.{name}"] for name in cfg.tracking],
        by_path=by_path,
    )


def component(cfg: DictConfig, path: str) -> Any:
    """Makes the component at a path of a config."""
    return build(OmegaConf.select(cfg, path), path)
