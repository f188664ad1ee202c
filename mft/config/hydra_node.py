"""Hydra's own node of a composed config, judged before Hydra builds or writes anything of it.

A yaml can set all of it, from launchers and callbacks to factories of log handlers. The rule is that of
components: first the package, by its name alone; then the class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from mft.config import plugins
from mft.config.components import imported, inside, unknown_package
from mft.errors import UserError, shortened

PLUGINS = ("hydra_plugins", "hydra._internal.core_plugins")
"""Where Hydra finds launchers and sweepers; whoever installs a package into it has chosen that."""

CALLBACKS = "hydra.experimental.callbacks"

LOGGING = {
    "class": ("logging.StreamHandler", "logging.NullHandler", "logging.FileHandler", "logging.Formatter"),
    "()": ("colorlog.ColoredFormatter",),
    "filename": ("${hydra.runtime.output_dir}/${hydra.job.name}.log", "hydra-${hydra.job.name}.log"),
}
"""Keys of logging's dictConfig that name code or a file → what Hydra's own options have there."""

STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_searchpath(places: Any) -> None:
    """Raises UserError for a package of yaml files (pkg://…) that is not named: to list it, Hydra imports
    it."""
    for place in places if isinstance(places, list) else ():
        if str(place).startswith("pkg://"):
            package = str(place).removeprefix("pkg://").replace("/", ".")
            allowed = ["mft", "hydra", *plugins.allowed()]
            if not any(inside(package, name) for name in allowed):
                raise unknown_package(f"hydra.searchpath={place}", package, allowed)


def check(hydra: DictConfig) -> None:
    """Raises UserError for what runs code, or writes a file, that the person at the command line has not
    named."""
    for path, node in _mappings(hydra, "hydra"):
        for key in map(str, node):
            if key.startswith("_") and key != "_target_":
                raise UserError(f"{path}.{key}: unexpected; only _target_ and arguments are read.")
        if "_target_" in node:
            _check_target(_value(node, "_target_"), path)
    for name in ("hydra_logging", "job_logging"):
        _check_logging(hydra, name)
    if "/" in str(_value(hydra.job, "name")):
        raise UserError(
            f"hydra.job.name={hydra.job.name}: expected a name without slashes; log files are named by it."
        )
    if hydra.job.env_set or hydra.job.env_copy:
        raise UserError(
            "hydra.job.env_set, env_copy: unused; set variables in the shell, which every job inherits."
        )
    if hydra.output_subdir is not None:
        raise UserError(
            f"hydra.output_subdir={hydra.output_subdir}: unused; a run folder holds its config as "
            f"config.yaml."
        )
    _check_launcher(hydra)


def _check_target(target: Any, path: str) -> None:
    from hydra.core.plugins import Plugins
    from hydra.experimental.callback import Callback
    from hydra.plugins.launcher import Launcher
    from hydra.plugins.sweeper import Sweeper

    given = f"{path}._target_={target}"
    kinds: dict[str, type] = {"hydra.launcher": Launcher, "hydra.sweeper": Sweeper}
    if path in kinds:
        known = {
            name: cls
            for name, cls in Plugins.instance().class_name_to_class.items()
            if issubclass(cls, kinds[path])
        }
        if target not in known or not any(inside(str(target), package) for package in PLUGINS):
            raise UserError(
                f"{given}: expected an installed {path.removeprefix('hydra.')}: {', '.join(known)}."
            )
        return
    if not re.fullmatch(r"hydra\.callbacks\.\w+", path):
        raise UserError(
            f"{given}: unexpected; only hydra.launcher, hydra.sweeper and hydra.callbacks.NAME are built."
        )
    allowed = [CALLBACKS, "mft", *plugins.allowed()]
    package = next((name for name in allowed if isinstance(target, str) and inside(target, name)), None)
    if package is None:
        raise unknown_package(given, str(target), allowed)
    found = imported(target, given)
    if not (isinstance(found, type) and issubclass(found, Callback) and inside(found.__module__, package)):
        raise UserError(f"{given}: expected a subclass of hydra.experimental.callback.Callback.")


def _check_logging(hydra: DictConfig, name: str) -> None:
    for path, node in _mappings(hydra[name], f"hydra.{name}"):
        for key in map(str, node):
            written, value = _written(node, key), _value(node, key)
            allowed = LOGGING.get(key)
            if allowed and written not in allowed:
                raise UserError(f"{path}.{key}={shortened(written)}: expected one of {', '.join(allowed)}.")
            for text in (written, value):
                if isinstance(text, str) and re.match(r"\s*\w+://", text) and text not in STREAMS:
                    raise UserError(f"{path}.{key}={text}: expected one of {', '.join(STREAMS)}.")


def _check_launcher(hydra: DictConfig) -> None:
    """Lines of a batch script, which `setup` and a line break in any value are, come from the command line
    only."""
    given = [line.lstrip("+").partition("=")[0] for line in hydra.overrides.hydra]
    for path, node in _mappings(hydra.launcher, "hydra.launcher"):
        for key in map(str, node):
            value = _value(node, key)
            if key == "setup" and value and f"{path}.setup" not in given:
                raise UserError(
                    f"{path}.setup: shell commands are taken from the command line only: "
                    f"'{path}.setup=[\"…\"]'."
                )
            if key != "setup" and re.search(
                r"[\r\n]", f"{key}{'' if isinstance(value, DictConfig) else value}"
            ):
                raise UserError(f"{path}.{key}={shortened(value)}: must not hold a line break.")


def _mappings(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Yields a mapping and all mappings inside it, those that interpolations lead to as well."""
    if isinstance(node, DictConfig):
        yield path, node
        for key in map(str, node):
            yield from _mappings(_value(node, key), f"{path}.{key}")
    elif isinstance(node, ListConfig):
        for number in range(len(node)):
            yield from _mappings(_value(node, number), f"{path}[{number}]")


def _value(node: Any, key: Any) -> Any:
    """Returns a value; as it is written where it stands for what is known only later, e.g. a job's folder."""
    try:
        return node[key]
    except OmegaConfBaseException:
        return _written(node, key)


def _written(node: Any, key: Any) -> Any:
    return cast("Any", node._get_node(key))._value()
