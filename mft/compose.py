"""From command-line overrides to a resolved config; Hydra's messages become sentences that name the nearest match."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from omegaconf import AnyNode, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mft.build import resolved
from mft.config import config_dir, register, typed
from mft.data.template import is_file
from mft.errors import UserError, nearest, shortened


def key_of(override: str) -> str:
    """Returns what an override sets."""
    return override.split("=", 1)[0].lstrip("+~")


def search_path(config_dirs: Sequence[Path]) -> list[str]:
    """Returns the override that adds folders of yaml files to conf/; UserError for one that is no folder."""
    for folder in config_dirs:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder} is not a folder.")
    quoted = ",".join("'file://" + str(folder.resolve()).replace("'", "\\'") + "'" for folder in config_dirs)
    return [f"hydra.searchpath=[{quoted}]"] if config_dirs else []


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the config that `overrides` compose from conf/ and further folders of yaml files, not yet resolved.

    Raises UserError for unknown groups, options and keys, and for values of the wrong type.
    """
    register()
    search = search_path(config_dirs)
    try:
        check_choices(overrides)
        return _compose([*search, *overrides])
    except refusals() as error:
        raise UserError(explain(error, search, overrides)) from error


def compose_resolved(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the composed config with every interpolation replaced and paths of the settings made absolute."""
    cfg = resolved(compose(overrides, config_dirs))
    try:
        return absolute_paths(typed(cfg))
    except refusals() as error:
        raise UserError(explain(error, search_path(config_dirs), overrides)) from error


def absolute_paths(cfg: DictConfig) -> DictConfig:
    """Makes the config independent of the folder it was composed in; `~` is expanded."""

    def absolute(path: str) -> str:
        if path.startswith("hf:"):  # a data set of the hub
            return path
        return os.path.abspath(os.path.expanduser(path))

    def all_absolute(paths: Iterable[Any], key: str) -> list[str]:
        paths = list(paths)
        if wrong := [path for path in paths if not isinstance(path, str)]:
            raise UserError(f"{key}: {shortened(wrong[0])} is no path; allowed: text, in quotes where it is a number.")
        return [absolute(path) for path in paths]

    cfg.output_dir, cfg.cache_dir = absolute(cfg.output_dir), absolute(cfg.cache_dir)
    cfg.data.paths = all_absolute(cfg.data.paths, "data.paths")
    if is_file(cfg.data.template):
        cfg.data.template = absolute(cfg.data.template)
    for name, task in cfg.task.items():
        if isinstance(task, DictConfig) and not {"_target_", "paths"} & set(task):
            chosen = [str(key) for key, node in cfg.task.items() if "_target_" in node]
            raise UserError(f"task.{name!s}.{next(iter(task), '')!s}: {_not_chosen(str(name), chosen)}")
        for key in ("paths", "valid"):
            if isinstance(task, DictConfig) and OmegaConf.is_list(task.get(key)):
                task[key] = all_absolute(task[key], f"task.{name}.{key}")
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


def refusals() -> tuple[type[Exception], ...]:
    """Returns what is raised while composing where the command line or a yaml is wrong; `explain` says it."""
    from hydra.errors import HydraException

    return HydraException, OmegaConfBaseException, YAMLError


def check_choices(overrides: Sequence[str]) -> None:
    """Raises UserError where a config group is given a number or null, at which Hydra itself ends in a traceback."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group = override.key_or_group
        if not (config_dir() / group).is_dir() or override.is_delete() or override.is_sweep_override():
            continue
        value = override.value()
        if value is None or isinstance(value, int | float):
            options = ", ".join(group_options(group))
            raise UserError(
                f"{override.input_line}: {group} takes the name of an option, or is left out. Allowed: {options}."
            )


def explain(error: Exception, search: Sequence[str], overrides: Sequence[str]) -> str:
    """Returns a sentence for what was refused while composing: the key, what is allowed, the nearest match."""
    if isinstance(error, YAMLError):
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}:{mark.line + 1}: " if mark else ""
        return f"{place}is not YAML: {getattr(error, 'problem', None) or error}."
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if (unread := getattr(error, "override", None)) is not None:
        return (
            f"{unread}: cannot be read ({text.splitlines()[0].strip()}). Brackets and quotes must be closed; text that "
            'holds brackets, commas or = stands in quotes of its own: \'data.paths=["a,b","c=d"]\'.'
        )
    if match := re.search(r"Ambiguous value for argument '(([^=]+)=(.*))'", text):
        given, key, values = match.groups()
        return f"{given}: several values are a sweep, mft train -m {given}; a list is written {key}=[{values}]."
    if match := re.search(r"Multiple values for ([^.]+)\.|(\S+) appears more than once", text):
        group = match.group(1) or match.group(2)
        return f"+{group}: an option of this group is chosen already; write {group}=… without the plus."
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _missing_option(match.group(1), search)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match.group(1).removeprefix("/"), search, overrides)
    reason = next((line.strip() for line in text.splitlines() if re.search(REASON, line)), "")
    reason = next((sentence for said, sentence in PLAINER.items() if said in reason), reason)
    if match := re.search(r"In '([^']+)': \w+ raised", text):
        return _wrong_yaml(match.group(1), text, reason, search, overrides)
    if match := re.search(r"Error merging override (.+)", text):
        given = match.group(1)
        return f"{given}: {reason}" if reason else _unknown_key(key_of(given), search, overrides)
    if match := re.search(r"full_key: (\S+)", text):
        name = match.group(1)
        if "not in '" in text:
            return _unknown_key(name, search, overrides)
        value = next((o.split("=", 1)[1] for o in overrides if key_of(o) == name), None)
        return f"{name if value is None else f'{name}={value}'}: {reason or text.splitlines()[0]}"
    return text.strip()


REASON = r"Value '|Invalid (value|type)|is not Optional|does not support deletion|Cannot (merge|convert 'list')"
"""Lines in which OmegaConf says what is wrong with a value."""

PLAINER = {
    "Invalid value assigned": "is no list; a list is written [a,b]",
    "DictConfig with ListConfig": "is no list; a list is written [a,b]",
    "is not Optional": "must not be null",
    "does not support deletion": "a setting cannot be taken out; leave it as it is, or give it a value",
}
"""Part of such a line → what a person reads instead."""


def _wrong_yaml(name: str, text: str, reason: str, search: Sequence[str], overrides: Sequence[str]) -> str:
    """`experiment/mine`: a yaml that does not fit into the config."""
    group = name.partition("/")[0]
    match = re.search(r"full_key: (\S+)", text)
    key = match.group(1) if match else ""
    if key == group != "task" and "not in '" in text:
        return f"{name}.yaml: its first line must be `# @package _global_`."
    if "not in '" in text:
        return f"{name}.yaml: {_unknown_key(key, search, [o for o in overrides if key_of(o) != group])}"
    return f"{name}.yaml: {key}: {reason}" if key and reason else f"{name}.yaml: holds no keys of the config."


def _missing_option(option: str, search: Sequence[str]) -> str:
    """`peft/lroa`: names the group's options and the nearest one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    group, _, name = option.rpartition("/")
    parsed = OverridesParser.create().parse_overrides(list(search))
    found = [place for override in parsed for place in cast("list[str]", override.value())]
    options = group_options(group, [Path(str(place).removeprefix("file://")) for place in found])
    more = (
        " A yaml of your own goes into task/ under --config-dir; folders need none: data.paths=[…]."
        if group == "task"
        else ""
    )
    allowed = f" Allowed: {', '.join(options)}." if options else ""
    hint = nearest(name, options) or "."
    return f"{group}={name}: there is no {name!r} in the config group {group!r}{hint}{allowed}{more}"


def group_options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """Returns the options of a config group in conf/ and `folders`; `base` holds what options share and is none."""
    found = {path.stem for folder in (config_dir(), *folders) for path in (folder / group).glob("*.yaml")}
    return sorted(found - {"base"})


def _unknown_key(key: str, search: Sequence[str], overrides: Sequence[str]) -> str:
    """`peft.rnk`: composes without the wrong override to see which keys its node has."""
    rest = [o for o in overrides if key_of(o).split("@")[0] != key.split("@")[0]]
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
    if path == ["task"]:
        return f"{key}: {_not_chosen(wrong, keys)}"
    groups = [p.name for p in config_dir().iterdir() if p.is_dir()] if not path else []
    options = [*keys, *(g for g in groups if g not in keys)]
    where = f"{'.'.join(path)} has" if path else "the config has"
    hint = nearest(wrong, options) or _elsewhere(wrong, cfg, similar=not path) or "."
    return f"{key}: {where} no key {wrong!r}{hint} Allowed: {', '.join(options) or 'none'}."


def _not_chosen(wrong: str, chosen: Sequence[str]) -> str:
    return (
        f"no task {wrong!r} is chosen{nearest(wrong, chosen) or '.'} Chosen: {', '.join(chosen) or 'none'}; "
        "task=[NAME] chooses one that has a yaml, and a folder of data.paths has no settings of its own."
    )


def _elsewhere(wrong: str, cfg: DictConfig, similar: bool) -> str:
    """Returns "; did you mean optimizer.lr?" where a key of this name (or one like it) stands in another place."""
    places: dict[str, str] = {}
    for path in _all_keys(cfg):
        places.setdefault(path.rsplit(".", 1)[-1], path)
    close = get_close_matches(wrong, places, n=1, cutoff=0.75) if similar else []
    name = wrong if wrong in places else next(iter(close), None)
    return f"; did you mean {places[name]}?" if name else ""


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    found = []
    for key in map(str, node) if isinstance(node, DictConfig) else ():
        path = f"{prefix}{key}"
        found += [path, *_all_keys(node._get_node(key), path + ".")]
    return found
