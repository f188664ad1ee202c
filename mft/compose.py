"""From command-line overrides to a resolved config; Hydra's messages become sentences that name the nearest match."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import AnyNode, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mft.build import resolved
from mft.config import config_dir, register, typed
from mft.data.template import is_file
from mft.errors import UserError, nearest


def key_of(override: str) -> str:
    """Returns what an override sets."""
    return override.split("=", 1)[0].lstrip("+~")


def search_path(config_dirs: Sequence[Path]) -> list[str]:
    """Returns the override that adds folders of yaml files to conf/; UserError for one that is no folder."""
    for folder in config_dirs:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder} is not a folder.")
    return [f"hydra.searchpath=[{','.join('file://' + str(f.resolve()) for f in config_dirs)}]"] if config_dirs else []


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the config that `overrides` compose from conf/ and further folders of yaml files, not yet resolved.

    Raises UserError for unknown groups, options and keys, and for values of the wrong type.
    """
    from hydra.errors import HydraException

    register()
    search = search_path(config_dirs)
    try:
        return _compose([*search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, search, overrides)) from error


def compose_resolved(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the composed config with every interpolation replaced and paths of the settings made absolute."""
    return absolute_paths(typed(resolved(compose(overrides, config_dirs))))


def absolute_paths(cfg: DictConfig) -> DictConfig:
    """Makes the config independent of the folder it was composed in; `~` is expanded."""

    def absolute(path: str) -> str:
        if path.startswith("hf:"):  # a data set of the hub
            return path
        return os.path.abspath(os.path.expanduser(path))

    cfg.output_dir, cfg.cache_dir = absolute(cfg.output_dir), absolute(cfg.cache_dir)
    cfg.data.paths = [absolute(path) for path in cfg.data.paths]
    if is_file(cfg.data.template):
        cfg.data.template = absolute(cfg.data.template)
    for task in cfg.task.values():
        for key in ("paths", "valid"):
            if isinstance(task, DictConfig) and OmegaConf.is_list(task.get(key)):
                task[key] = [absolute(path) for path in task[key]]
    return cfg


def _compose(overrides: Sequence[str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    instance = GlobalHydra.instance()
    running, instance.hydra = instance.hydra, None  # of the sweep in which a wrong key is explained
    try:
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            cfg = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    finally:
        instance.hydra = running
    return without_hydra(cfg)


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Takes Hydra's own node out of a composed config; what it knows of the options taken stays in `choices`."""
    with open_dict(cfg):
        groups = cfg.pop("hydra").runtime.choices
    return with_choices(cfg, groups)


def with_choices(cfg: DictConfig, groups: Mapping[str, Any]) -> DictConfig:
    """Notes the option taken of every config group in `choices`."""
    cfg.choices = {name: str(option) for name, option in groups.items() if name in cfg and name != "choices"}
    return cfg


def explain(error: Exception, search: Sequence[str], overrides: Sequence[str]) -> str:
    """Returns a sentence for what Hydra or OmegaConf said: the key, what is allowed, the nearest match."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _missing_option(match.group(1))
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match.group(1).removeprefix("/"), search, overrides)
    if match := re.search(r"Error merging override ([^=\s]+)", text):
        name = match.group(1)
        reason = next((line for line in text.splitlines() if "Value" in line or "Invalid" in line), "")
        given = next((o for o in overrides if key_of(o) == name), name)
        return f"{given}: {reason.strip()}" if reason else _unknown_key(name, search, overrides)
    if match := re.search(r"full_key: (\S+)", text):
        value = next((o.split("=", 1)[1] for o in overrides if key_of(o) == match.group(1)), None)
        reason = next(
            (line for line in text.splitlines() if "Value" in line or "Invalid" in line), text.splitlines()[0]
        )
        given = f"{match.group(1)}={value}" if value is not None else match.group(1)
        return f"{given}: {reason.strip()}"
    return text.strip()


def _missing_option(option: str) -> str:
    """`peft/lroa`: names the group's options and the nearest one."""
    group, _, name = option.rpartition("/")
    options = group_options(group)
    more = (
        " A yaml of your own goes into task/ under --config-dir; folders need none: data.paths=[…]."
        if group == "task"
        else ""
    )
    allowed = f" Allowed: {', '.join(options)}." if options else ""
    hint = nearest(name, options) or "."
    return f"{group}={name}: there is no {name!r} in the config group {group!r}{hint}{allowed}{more}"


def group_options(group: str) -> list[str]:
    """Returns the options of a config group in conf/; `base` holds what options share and is none."""
    return [path.stem for path in sorted((config_dir() / group).glob("*.yaml")) if path.stem != "base"]


def _unknown_key(key: str, search: Sequence[str], overrides: Sequence[str]) -> str:
    """`peft.rnk`: composes without the wrong override to see which keys its node has."""
    rest = [o for o in overrides if key_of(o).split("@")[0] != key]
    try:
        cfg: Any = _compose([*search, *rest])
    except Exception:
        return f"There is no key {key!r}."
    node: Any = cfg
    path: list[str] = []
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            break
        node, path = node._get_node(part), [*path, part]
    if not isinstance(node, DictConfig):
        if type(node) is AnyNode and node._is_none():
            return f"{key}: {'.'.join(path)} is null so far; a plus adds keys to it: +{key}=…"
        return f"{key}: {'.'.join(path)} is a value and has no keys below it."
    if len(path) == len(key.split(".")):
        known = ", ".join(map(str, node)) or "none yet"
        return f"{key} is a group of keys ({known}); a new one is added with +{key}.NAME=…"
    wrong = key.split(".")[len(path)]
    keys = [str(k) for k in node if not str(k).startswith("_")]
    groups = [p.name for p in config_dir().iterdir() if p.is_dir()] if not path else []
    options = [*keys, *(g for g in groups if g not in keys)]
    where = f"{'.'.join(path)} has" if path else "the config has"
    if not path and (deep := [p for p in _all_keys(cfg) if p.rsplit(".", 1)[-1] == wrong]):
        return f"{key}: {where} no key {wrong!r}; did you mean {deep[0]}?"
    return f"{key}: {where} no key {wrong!r}{nearest(wrong, options) or '.'} Allowed: {', '.join(options) or 'none'}."


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    found = []
    for key in map(str, node) if isinstance(node, DictConfig) else ():
        path = f"{prefix}{key}"
        found += [path, *_all_keys(node._get_node(key), path + ".")]
    return found
