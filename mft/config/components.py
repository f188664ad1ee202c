"""Which class a `_target_` may name: one that an allowed package defines and that implements its group's
contract."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import traceback

from omegaconf import DictConfig

from mft.config import plugins
from mft.errors import UserError, nearest, shortened

CONTRACTS = {
    "task": ("mft.data.task:Task", "mft.data.task.Task"),
    "format": ("mft.data.formats:Format", "mft.data.formats.Chat"),
    "data": ("mft.data.packing:RowBuilder", "mft.data.packing.Pack"),
    "model": ("mft.model.causal_lm:CausalLM", "mft.model.causal_lm.CausalLM"),
    "peft": ("mft.model.peft.full:Full", "mft.model.peft.lora.Lora"),
    "dist": ("mft.distributed.engine:Backend", "mft.distributed.ddp.Ddp"),
    "loss": ("mft.loss.base:TaskLoss", "mft.loss.means.TokenMean"),
    "optimizer": ("mft.optim.optimizers:Optimizer", "mft.optim.optimizers.AdamW"),
    "scheduler": ("mft.optim.schedules:Schedule", "mft.optim.schedules.Cosine"),
    "tracking": ("mft.tracking.base:Tracker", "mft.tracking.mlflow.Mlflow"),
}
"""Config group → (module:class that its components subclass, an example). Imported on demand: some need
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
"""Former module or class → current module; users' yaml files and the configs of older runs name the
former."""

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def component_class(node: object, path: str) -> type:
    """Returns the class that the component node at a yaml path names in `_target_`.

    The package is judged by its name before anything is imported. Raises UserError for a node without a
    target, a package that is not allowed, a module that cannot be imported, and for what is not a component
    of this group.
    """
    target = node["_target_"] if isinstance(node, DictConfig) and node._get_node("_target_") else None
    group = group_of(path)
    if not isinstance(target, str):
        raise UserError(f"{path} has no _target_, the class to build; got {shortened(node)}. {_choose(path)}")
    setting = f"{path}._target_={target}"
    if not _NAME.fullmatch(target):
        raise UserError(f"{setting}: expected package.module.Class, for example {_example(group)}.")
    libraries = LIBRARIES.get(group, ())
    # What is ours is looked for in mft alone, whatever packages a plug-in brings.
    allowed = ["mft"] if inside(target, "mft") else ["mft", *libraries, *plugins.allowed()]
    package = package_of(target, allowed, setting)
    return _judged(imported(moved(target), setting), package, group, setting)


def package_of(target: str, allowed: list[str], setting: str) -> str:
    """Returns the allowed package that a target lies in; raises UserError if there is none."""
    for package in allowed:
        if target.startswith(f"{package}."):
            return package
    top = target.partition(".")[0]
    raise UserError(
        f"{setting}: {top} is not a package that a config may name{nearest(top, allowed) or '.'} Allowed: "
        f"{', '.join(allowed)}. One of your own is named with --plugin {top} on the command line, or by "
        f"its installed entry point of the group {plugins.GROUP} (docs/plugins.md)."
    )


def moved(target: str) -> str:
    """Returns the current name of a target."""
    module, _, name = target.rpartition(".")
    now = MOVED.get(target) or MOVED.get(module)
    return f"{now}.{name}" if now and name[:1].isupper() else target


def group_of(path: str) -> str:
    """Returns the config group of a component at a yaml path; "" for one inside another, which may be of any
    kind."""
    parts = path.split(".")
    if parts[0] == "task":
        return "task" if len(parts) == 2 else "format" if parts[2:] == ["format"] else ""
    if len(parts) == (2 if parts[0] in ("data", "tracking") else 1):
        return parts[0] if parts[0] in CONTRACTS else ""
    return ""


def inside(name: str, package: str) -> bool:
    """Whether a dotted name is a package or lies in it."""
    return name == package or name.startswith(f"{package}.")


def imported(target: str, setting: str) -> object:
    """Imports the module of a target and returns its attribute; UserErrors start with `setting`."""
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        reason = f"{module_name} needs the module {missing}, which is not installed."
        # The module itself, or one on the way to it; any other is imported by it.
        if inside(module_name, missing):
            reason = f"there is no module {missing}{_nearest_module(missing)}"
        raise UserError(f"{setting}: {reason}") from error
    except (Exception, SystemExit) as error:  # whatever the code of a plug-in raises
        reason = f"{type(error).__name__}: {error}{_line_of(error, module_name)}"
        raise UserError(f"{setting}: {module_name} cannot be imported: {reason}") from error
    # vars, not getattr: a module can make attributes up
    if name not in vars(module):
        classes = [n for n, value in vars(module).items() if isinstance(value, type) and n[0] != "_"]
        raise UserError(f"{setting}: {module_name} has no {name}{nearest(name, classes) or '.'}")
    return vars(module)[name]


def _judged(cls: object, package: str, group: str, setting: str) -> type:
    """Returns what was imported, if it is a component of the group."""
    of_library = package in LIBRARIES.get(group, ())
    paths = [CONTRACTS[name][0].partition(":") for name in ([group] if group else CONTRACTS)]
    contracts = [getattr(importlib.import_module(module), name) for module, _, name in paths]
    if of_library:
        from torch.optim import Optimizer

        contracts = [Optimizer]
    expected = "expected a subclass of a component."
    if group:
        names = " or ".join(f"{kind.__module__}.{kind.__name__}" for kind in contracts)
        expected = f"expected a subclass of {names}, for example {_example(group)}."
    if not isinstance(cls, type):
        kind = "a module" if inspect.ismodule(cls) else "a function" if callable(cls) else "a value"
        problem = f"is {kind}; {expected}"
    elif not inside(cls.__module__, package):  # what a module merely imports is not its to offer
        problem = f"the class is defined in {cls.__module__}, outside of {package}."
    elif not issubclass(cls, tuple(contracts)):
        problem = expected
    elif missing := sorted(getattr(cls, "__abstractmethods__", ())):
        problem = f"the class does not define {', '.join(missing)}, so nothing can be built of it."
    elif of_library and cls is contracts[0]:
        problem = "is the base of all optimizers; name one of them, for example torch.optim.AdamW."
    elif not of_library and not dataclasses.is_dataclass(cls):
        problem = "the class is not a dataclass; the fields of a component are its settings."
    else:
        return cls
    raise UserError(f"{setting}: {problem}")


def _example(group: str) -> str:
    return CONTRACTS[group or "model"][1]


def _choose(path: str) -> str:
    group = path.partition(".")[0]
    if group == "task":
        return (
            "A task's yaml begins with the line `# @package task.NAME` and has _target_: mft.data.task.Task."
        )
    option = f"/{group}: NAME" if group != "tracking" else "/tracking: [NAME]"
    return f"Choose one with {group}=NAME, or in a yaml with `defaults: [override {option}]`."


def _nearest_module(missing: str) -> str:
    """Returns "; did you mean X?" for a module that does not exist, or "."."""
    parent, _, name = missing.rpartition(".")
    try:
        places = importlib.import_module(parent).__path__ if parent else []
    except (ImportError, AttributeError):
        return "."
    return nearest(name, [module.name for module in pkgutil.iter_modules(places)]) or "."


def _line_of(error: BaseException, module_name: str) -> str:
    """Returns the last line of the plug-in that ran before its import failed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    top = module_name.partition(".")[0]
    lines = [
        f" ({frame.f_code.co_filename}:{line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if top != "mft" and inside(str(frame.f_globals.get("__name__", "")), top)
    ]
    return lines[-1] if lines else ""
