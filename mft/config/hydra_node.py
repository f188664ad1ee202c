"""Hydra's own node of a composed config, checked before Hydra builds or writes anything from it.

A yaml can set all of it, from launchers and callbacks to factories of log handlers. The rule is that of
components: first the package, by its name alone; then the class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from mft.config import plugins
from mft.config.components import imported, inside, package_of
from mft.errors import UserError, shortened

PLUGINS = ("hydra_plugins", "hydra._internal.core_plugins")
"""Where Hydra finds launchers and sweepers; installing a package there is consent."""

CALLBACKS = "hydra.experimental.callbacks"

LOGGING = {
    "class": ("logging.StreamHandler", "logging.NullHandler", "logging.FileHandler", "logging.Formatter"),
    "()": ("colorlog.ColoredFormatter",),
    "filename": ("${hydra.runtime.output_dir}/${hydra.job.name}.log", "hydra-${hydra.job.name}.log"),
}
"""Keys of logging's dictConfig that name code or a file → what Hydra's own options have there."""

STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check(hydra: DictConfig) -> None:
    """Raises UserError for settings that run code or write files which the command line did not name."""
    settings = [*_settings(hydra, "hydra")]
    for path, _, key in settings:
        if key.startswith("_") and key != "_target_":
            raise UserError(f"{path}.{key}: unexpected; only _target_ and arguments are read.")
    for path, node, key in settings:
        if key == "_target_":
            _check_target(_value(node, key), path)
    for name in ("hydra_logging", "job_logging"):
        for path, node, key in _settings(hydra[name], f"hydra.{name}"):
            _check_logging(path, node, key)
    if "/" in str(_value(hydra.job, "name")):
        raise UserError(f"hydra.job.name={hydra.job.name}: expected a name without slashes, for log files.")
    if hydra.job.env_set or hydra.job.env_copy:
        raise UserError("hydra.job.env_set, env_copy: unused; set variables in the shell; jobs inherit them.")
    if hydra.output_subdir is not None:
        raise UserError(
            f"hydra.output_subdir={hydra.output_subdir}: unused; the config of a run is its config.yaml."
        )
    # Lines of a batch script, which `setup` and a line break in any value are, come from the command line.
    on_command_line = [line.lstrip("+").partition("=")[0] for line in hydra.overrides.hydra]
    for path, node, key in _settings(hydra.launcher, "hydra.launcher"):
        value = _value(node, key)
        if key == "setup":
            if value and f"{path}.setup" not in on_command_line:
                raise UserError(
                    f"{path}.setup: shell commands are taken from the command line only: "
                    f"'{path}.setup=[\"…\"]'."
                )
        elif re.search(r"[\r\n]", key if isinstance(value, DictConfig) else f"{key}{value}"):
            raise UserError(f"{path}.{key}={shortened(value)}: must not hold a line break.")


def _check_target(target: object, path: str) -> None:
    from hydra.core.plugins import Plugins
    from hydra.experimental.callback import Callback
    from hydra.plugins.launcher import Launcher
    from hydra.plugins.sweeper import Sweeper

    setting = f"{path}._target_={target}"
    kinds: dict[str, type] = {"hydra.launcher": Launcher, "hydra.sweeper": Sweeper}
    if path in kinds:
        classes = Plugins.instance().class_name_to_class
        names = [name for name, cls in classes.items() if issubclass(cls, kinds[path])]
        if target not in names or not any(inside(str(target), package) for package in PLUGINS):
            kind = path.removeprefix("hydra.")
            raise UserError(f"{setting}: expected an installed {kind}: {', '.join(names)}.")
    elif not re.fullmatch(r"hydra\.callbacks\.\w+", path):
        raise UserError(
            f"{setting}: unexpected; only a launcher, a sweeper and hydra.callbacks.NAME are built."
        )
    else:
        package = package_of(str(target), [CALLBACKS, "mft", *plugins.allowed()], setting)
        cls = imported(str(target), setting)
        if not (isinstance(cls, type) and issubclass(cls, Callback) and inside(cls.__module__, package)):
            raise UserError(f"{setting}: expected a subclass of hydra.experimental.callback.Callback.")


def _check_logging(path: str, node: DictConfig, key: str) -> None:
    """Checks a key of logging's dictConfig, which builds what `class` and `()` name and resolves ext://…."""
    written, value = _written(node, key), _value(node, key)
    allowed = LOGGING.get(key)
    if allowed and written not in allowed:
        raise UserError(f"{path}.{key}={shortened(written)}: expected one of {', '.join(allowed)}.")
    for text in (written, value):
        if isinstance(text, str) and re.match(r"\s*\w+://", text) and text not in STREAMS:
            raise UserError(f"{path}.{key}={text}: expected one of {', '.join(STREAMS)}.")


def _settings(node: object, path: str) -> Iterator[tuple[str, DictConfig, str]]:
    """Yields (path, mapping, key) for every key of a mapping and of all mappings in it, interpolations
    followed."""
    if isinstance(node, DictConfig):
        for key in map(str, node):
            yield path, node, key
        for key in map(str, node):
            yield from _settings(_value(node, key), f"{path}.{key}")
    elif isinstance(node, ListConfig):
        for number in range(len(node)):
            yield from _settings(_value(node, number), f"{path}[{number}]")


def _value(node: DictConfig | ListConfig, key: str | int) -> Any:
    """Returns a value, unresolved where it depends on what is known only later, such as a job's folder."""
    try:
        return node[key]  # type: ignore[index]
    except OmegaConfBaseException:
        return _written(node, key)


def _written(node: DictConfig | ListConfig, key: str | int) -> Any:
    child: Any = node._get_node(key)  # type: ignore[arg-type]  # a number in a list, else a name
    return child._value()
