"""Which class a `_target_` may name: of an allowed package, defined there, and a subclass of its group's
contract."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

from omegaconf import DictConfig

from mft.config import plugins
from mft.errors import UserError, nearest, shortened

CONTRACTS = {
    "task": "mft.data.task:Task",
    "format": "mft.data.formats:Format",
    "data": "mft.data.packing:RowBuilder",
    "model": "mft.model.causal_lm:CausalLM",
    "peft": "mft.model.peft.full:Full",
    "dist": "mft.distributed.engine:Backend",
    "loss": "mft.loss.base:TaskLoss",
    "optimizer": "mft.optim.optimizers:Optimizer",
    "scheduler": "mft.optim.schedules:Schedule",
    "tracking": "mft.tracking.base:Tracker",
}
"""Config group → module:class that its components subclass. Resolved when asked for, since some import
numpy."""

LIBRARIES = {"optimizer": ("torch.optim", "bitsandbytes.optim")}
"""Config group → packages whose own classes it may name; they subclass torch.optim.Optimizer."""

MOVED = {
    "mft.data.pack": "mft.data.packing",
    "mft.dist.whole": "mft.distributed.ddp",
    "mft.dist.fsdp": "mft.distributed.fsdp",
    "mft.dist.deepspeed": "mft.distributed.deepspeed",
    "mft.loss.mean": "mft.loss.means",
    "mft.model.family": "mft.model.causal_lm",
    "mft.model.legacy": "mft.model.legacy.families",
    "mft.model.baichuan": "mft.model.legacy.baichuan",
    "mft.model.peft.Full": "mft.model.peft.full",
    "mft.model.peft.Lora": "mft.model.peft.lora",
    "mft.model.peft.QLora": "mft.model.peft.qlora",
    "mft.optim": "mft.optim.optimizers",
    "mft.schedule": "mft.optim.schedules",
}
"""Old module, or class → the module of its components now: yaml files of users and configs of older runs name
these."""

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def component_class(node: Any, path: str) -> type:
    """Returns the class that the component node at a yaml path names in `_target_`.

    The package is judged by its name before anything is imported. Raises UserError for a node without a
    target, a package that is not allowed, a module that cannot be imported, and for what is not a component
    of this group.
    """
    target = node._get_node("_target_") if isinstance(node, DictConfig) else None
    target = node["_target_"] if target is not None else None
    if not isinstance(target, str):
        raise UserError(
            f"{path} has no _target_: it names a component to build, got {shortened(node)}. {_choose(path)}"
        )
    given = f"{path}._target_={target}"
    if not _NAME.fullmatch(target):
        raise UserError(f"{given}: expected package.module.Class, for example {_example(path)}.")
    package = _package(target, path)
    return _judged(imported(moved(target), given), package, path, given)


def moved(target: str) -> str:
    """Returns the target under its present name."""
    module, _, name = target.rpartition(".")
    now = MOVED.get(target) or MOVED.get(module)
    return f"{now}.{name}" if now and name[:1].isupper() else target


def group_of(path: str) -> str:
    """Returns the config group of a component at a yaml path, "" for one inside another, where any kind may
    stand."""
    parts = path.split(".")
    if parts[0] == "task":
        return "task" if len(parts) == 2 else "format" if parts[2:] == ["format"] else ""
    if len(parts) == (2 if parts[0] in ("data", "tracking") else 1):
        return parts[0] if parts[0] in CONTRACTS else ""
    return ""


def contract(group: str) -> type:
    """Returns the class that the components of a group subclass."""
    module, _, name = CONTRACTS[group].partition(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def inside(name: str, package: str) -> bool:
    """Whether a dotted name is a package or lies below it."""
    return name == package or name.startswith(f"{package}.")


def unknown_package(given: str, target: str, allowed: list[str]) -> UserError:
    """Returns the refusal of a target outside of the packages that may be named."""
    top = target.partition(".")[0]
    return UserError(
        f"{given}: {top} is not a package that a config may name{nearest(top, allowed) or '.'} Allowed: "
        f"{', '.join(allowed)}. One of your own is named with --plugin {top} on the command line, or by "
        f"its installed entry point of the group {plugins.GROUP} (docs/plugins.md)."
    )


def _package(target: str, path: str) -> str:
    libraries = LIBRARIES.get(group_of(path), ())
    allowed = ["mft", *libraries, *plugins.allowed()] if not inside(target, "mft") else ["mft"]
    for package in allowed:
        if inside(target, package) and target != package:
            return package
    raise unknown_package(f"{path}._target_={target}", target, allowed)


def imported(target: str, given: str) -> Any:
    """Imports the module of a target and returns what it has by that name; UserError that begins with
    `given`."""
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if inside(module_name, missing):
            raise UserError(f"{given}: there is no module {missing}{_neighbour(missing)}") from error
        raise UserError(
            f"{given}: {module_name} needs the module {missing}, which is not installed."
        ) from error
    except (Exception, SystemExit) as error:
        place = _line_of(error, module_name)
        raise UserError(
            f"{given}: {module_name} cannot be imported: {type(error).__name__}: {error}{place}"
        ) from error
    if name not in vars(module):
        raise UserError(f"{given}: {module_name} has no {name}{nearest(name, _public(module)) or '.'}")
    return vars(module)[name]


def _judged(found: Any, package: str, path: str, given: str) -> type:
    group = group_of(path)
    contracts = [contract(g) for g in ([group] if group else CONTRACTS)]
    if package in LIBRARIES.get(group, ()):
        from torch.optim import Optimizer

        contracts = [Optimizer]
    expected = " or ".join(f"{kind.__module__}.{kind.__name__}" for kind in contracts)
    expected = expected if group else "a component"
    if not isinstance(found, type):
        kind = "a module" if inspect.ismodule(found) else "a function" if callable(found) else "a value"
        raise UserError(f"{given}: is {kind}; expected a subclass of {expected}{_others(path)}")
    if not inside(found.__module__, package):
        raise UserError(f"{given}: the class is defined in {found.__module__}, outside of {package}.")
    if not issubclass(found, tuple(contracts)):
        raise UserError(f"{given}: expected a subclass of {expected}{_others(path)}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(
            f"{given}: the class does not define {', '.join(missing)}, so nothing can be built of it."
        )
    if package not in LIBRARIES.get(group, ()) and not dataclasses.is_dataclass(found):
        raise UserError(f"{given}: the class is not a dataclass; the fields of a component are its settings.")
    if package in LIBRARIES.get(group, ()) and found is contracts[0]:
        raise UserError(
            f"{given}: is the base of all optimizers; name one of them, for example torch.optim.AdamW."
        )
    return found


def _others(path: str) -> str:
    """Returns what may stand there instead: the options of the group."""
    group = group_of(path)
    return f", for example {_example(path)}." if group else "."


def _example(path: str) -> str:
    examples = {
        "task": "mft.data.task.Task",
        "format": "mft.data.formats.Chat",
        "data": "mft.data.packing.Pack",
        "peft": "mft.model.peft.lora.Lora",
        "dist": "mft.distributed.ddp.Ddp",
        "loss": "mft.loss.means.TokenMean",
        "optimizer": "mft.optim.optimizers.AdamW",
        "scheduler": "mft.optim.schedules.Cosine",
        "tracking": "mft.tracking.mlflow.Mlflow",
    }
    return examples.get(group_of(path), "mft.model.causal_lm.CausalLM")


def _choose(path: str) -> str:
    group = path.partition(".")[0]
    if group == "task":
        return "The yaml of a task begins with the line `# @package task.NAME` and holds _target_: mft.data.task.Task."
    option = f"/{group}: NAME" if group != "tracking" else "/tracking: [NAME]"
    return f"Choose one with {group}=NAME, or in a yaml with `defaults: [override {option}]`."


def _public(module: Any) -> list[str]:
    return [
        name for name, value in vars(module).items() if isinstance(value, type) and not name.startswith("_")
    ]


def _neighbour(missing: str) -> str:
    """Returns the nearest module beside one that does not exist."""
    import pkgutil

    parent, _, name = missing.rpartition(".")
    try:
        places = importlib.import_module(parent).__path__ if parent else []
    except (ImportError, AttributeError):
        return "."
    return nearest(name, [module.name for module in pkgutil.iter_modules(places)]) or "."


def _line_of(error: BaseException, module_name: str) -> str:
    """Returns the place in the plug-in where its import failed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    own, trace = "", error.__traceback__
    while trace is not None:
        file, name = trace.tb_frame.f_code.co_filename, str(trace.tb_frame.f_globals.get("__name__", ""))
        if inside(name, module_name.partition(".")[0]) and module_name.partition(".")[0] != "mft":
            own = f" ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return own
