"""From command-line overrides to a resolved config; Hydra's messages become sentences that name the nearest match."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from omegaconf import AnyNode, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mft.config import hydra_node, plugins
from mft.config.inputs import under
from mft.config.interpolations import bound, replaced
from mft.config.other_trainers import here
from mft.config.overrides import MOVED_KEYS, check_overrides, credentials_in, group_options, key_of
from mft.config.places import check_places
from mft.config.schema import config_dir, register, typed
from mft.config.yaml_file import circle
from mft.console import credentials
from mft.data.template_choice import is_file
from mft.errors import UserError, nearest, no_path, plainly, shortened


def search_path(config_dirs: Sequence[Path], overrides: Sequence[str] = ()) -> list[str]:
    """Returns the override that adds folders of yaml files, and those of plug-ins, to conf/ and what `overrides` add.

    Of several such overrides Hydra reads the first alone. Raises UserError for one that is not a folder.
    """
    for folder in config_dirs:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder} is not a folder.")
    places = [place for o in overrides if key_of(o) == "hydra.searchpath" for place in _places(o)]
    places += [f"file://{folder.resolve()}" for folder in (*config_dirs, *plugins.yaml_folders())]
    quoted = ",".join("'" + place.replace("'", "\\'") + "'" for place in dict.fromkeys(places))
    return [f"hydra.searchpath=[{quoted}]"] if places else []


def _places(search: str) -> list[str]:
    """Returns the folders and packages of an override of Hydra's search path; UserError for a package not named."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    value = OverridesParser.create().parse_override(search).value()
    hydra_node.check_searchpath(value)
    if not (isinstance(value, list) and all(isinstance(place, str) for place in value)):
        raise UserError(f"{search}: expected a list of folders, hydra.searchpath=['file:///my/folder'].")
    for place in value:
        if not place.startswith("pkg://") and not Path(place.removeprefix("file://")).is_dir():
            raise UserError(f"hydra.searchpath: {place} is not a folder; --config-dir DIR adds a folder of yamls.")
    return cast("list[str]", value)


def without_search_path(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides but those that `search_path` has taken up."""
    return [o for o in overrides if key_of(o) != "hydra.searchpath"]


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the config that `overrides` compose from conf/ and further folders of yaml files, not yet resolved.

    Raises UserError for unknown groups, options and keys, and for values of the wrong type.
    """
    register()
    search: list[str] = []
    try:
        search = search_path(config_dirs, overrides)
        overrides = without_search_path(overrides)
        check_overrides(overrides)
        return _compose([*search, *overrides])
    except RecursionError:
        raise UserError(circle()) from None
    except refusals() as error:
        raise UserError(explain(error, search, overrides)) from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        if (told := no_path(error)) is not None:
            raise told from error
        if (said := of_defaults(error)) is None:
            raise
        raise UserError(said) from error


def of_defaults(error: Exception) -> str | None:
    """Returns the sentence for a `defaults` in a yaml that Hydra cannot read, None for errors of another kind."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename.endswith(("defaults_list.py", "config_repository.py")):
            reason = " ".join(str(error).split())
            return f"The defaults of a yaml cannot be read: {reason}. Write a list such as `- override /peft: lora`."
        frame = frame.tb_next
    return None


def compose_resolved(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the composed config with paths of the settings made absolute and every interpolation replaced, but those
    of environment variables, which stay as they are written."""
    cfg = replaced(compose(overrides, config_dirs))
    try:
        return absolute_paths(typed(cfg))
    except refusals() as error:
        raise UserError(explain(error, search_path(config_dirs, overrides), overrides)) from error


def absolute_paths(cfg: DictConfig) -> DictConfig:
    """Makes the config independent of the folder it was composed in; `~` is expanded."""

    def absolute(path: str) -> str:
        if path.startswith("hf:"):  # a data set of the hub
            return path
        return os.path.abspath(os.path.expanduser(path))

    def place(node: Any, key: Any) -> str:
        value = node[key]
        if not OmegaConf.is_interpolation(node, key):
            return absolute(value)
        written = os.path.expanduser(node._get_node(key)._value())  # of a variable, which stays as it is written
        return written if absolute(value) == os.path.expanduser(value) else os.path.join(os.getcwd(), written)

    def all_absolute(paths: Any, key: str) -> list[str]:
        if wrong := [path for path in paths if not isinstance(path, str) or not path.strip()]:
            raise UserError(f"{key}: {shortened(wrong[0])} must be a path, in quotes where it is a number.")
        return [place(paths, number) for number in range(len(paths))]

    check_places(cfg)
    cfg.output_dir, cfg.cache_dir = place(cfg, "output_dir"), place(cfg, "cache_dir")
    cfg.data.paths = all_absolute(cfg.data.paths, "data.paths")
    if is_file(cfg.data.template):
        cfg.data.template = place(cfg.data, "template")
    for name, task in cfg.task.items():
        if isinstance(task, DictConfig) and not {"_target_", "paths"} & set(task):
            chosen = [str(key) for key, node in cfg.task.items() if "_target_" in node]
            raise UserError(f"task.{name}.{next(map(str, task), '')}: {_not_chosen(str(name), chosen)}")
        for key in ("paths", "valid"):
            if isinstance(task, DictConfig) and OmegaConf.is_list(task.get(key)):
                task[key] = all_absolute(task[key], f"task.{name}.{key}")
    return cfg


def check_sweep(overrides: Sequence[str]) -> None:
    """Judges Hydra's own node of a sweep, before Hydra builds its launcher, sweeper and callbacks."""
    cfg = _with_hydra(overrides, sweep=True)
    bound(cfg)
    hydra_node.check(cfg.hydra)


def _compose(overrides: Sequence[str]) -> DictConfig:
    return without_hydra(_with_hydra(overrides))


def _with_hydra(overrides: Sequence[str], sweep: bool = False) -> DictConfig:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    instance = GlobalHydra.instance()
    running, instance.hydra = instance.hydra, None  # of the sweep in which a wrong key is explained
    try:
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            hydra = instance.hydra
            assert hydra is not None
            return hydra.compose_config(
                config_name="config",
                overrides=list(overrides),
                run_mode=RunMode.MULTIRUN if sweep else RunMode.RUN,
                from_shell=False,
                with_log_configuration=False,
                validate_sweep_overrides=not sweep,
            )
    finally:
        instance.hydra = running


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Takes Hydra's own node, once judged, out of a composed config; the options taken stay in `choices`."""
    bound(cfg)
    hydra_node.check(cfg.hydra)
    refuse_credentials(cfg)
    with open_dict(cfg):
        hydra = cfg.pop("hydra")
    folder = hydra.run._get_node("dir")._value()
    if folder != "${output_dir}" and not any(key_of(o) == "output_dir" for o in hydra.overrides.task):
        cfg.output_dir = folder  # a yaml set what Hydra's users call the run folder
    return with_choices(cfg, hydra.runtime.choices)


def with_choices(cfg: DictConfig, groups: Mapping[str, Any]) -> DictConfig:
    """Notes the option taken of every config group in `choices`."""
    cfg.choices = {name: str(option) for name, option in groups.items() if name in cfg and name != "choices"}
    return cfg


def refusals() -> tuple[type[Exception], ...]:
    """Returns what is raised while composing where the command line or a yaml is wrong; `explain` says it."""
    from hydra.errors import HydraException

    return HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError


def refuse_credentials(node: Any, path: str = "") -> None:
    """Raises UserError for a password or key that an address in a config has written out."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        child = node._get_node(key)
        value, here = child._value(), f"{path}.{key}" if path else str(key)
        if isinstance(value, str) and credentials.written_out(value, path if isinstance(key, int) else here):
            raise UserError(credentials_in(here))
        if isinstance(child, DictConfig | ListConfig) and isinstance(value, dict | list):
            refuse_credentials(child, here)


def explain(error: Exception, search: Sequence[str], overrides: Sequence[str]) -> str:
    """Returns a sentence for what was refused while composing: the key, what is allowed, the nearest match."""
    if isinstance(error, UnicodeDecodeError):
        return f"{_not_text(search)} is not text in UTF-8; save it as UTF-8."
    if isinstance(error, RecursionError):
        return "A yaml or an override contains itself, or nests too deeply to be read."
    if isinstance(error, YAMLError):
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}:{mark.line + 1}: " if mark else ""
        return f"{place}not valid YAML: {getattr(error, 'problem', None) or error}."
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if match := re.search(r"Ambiguous value for argument '(([^=]+)=(.*))'", text):
        given, key, values = match.groups()
        return f"{given}: several values make a sweep, mft train -m {given}; for a list write {key}=[{values}]."
    if match := re.search(r"Multiple values for ([^.]+)\.|(\S+) appears more than once", text):
        group = match.group(1) or match.group(2)
        return f"+{group}: an option of this group is already chosen; write {group}=… without the plus."
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _missing_option(match.group(1), search)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match.group(1).removeprefix("/"), search, overrides)
    reason = next((line.strip() for line in text.splitlines() if re.search(REASON, line)), "")
    reason = plainly(reason)
    if match := re.search(r"In '([^']+)': \w+ raised", text):
        return _wrong_yaml(match.group(1), text, reason, search, overrides)
    if match := re.search(r"Error merging override (.+)", text):
        given = match.group(1)
        if reason.startswith("must be a list") and key_of(given) in ("train", "launch", "data"):
            reason = "must be a mapping, such as {a: 1}"
        return f"{given}: {_ended(reason)}" if reason else _unknown_key(key_of(given), search, overrides)
    if match := re.search(r"full_key: (\S+)", text):
        name = match.group(1)
        if "not in '" in text:
            return _unknown_key(name, search, overrides)
        value = next((o.split("=", 1)[1] for o in overrides if key_of(o) == name), None)
        said = reason or next((line.strip() for line in text.splitlines() if line.strip()), "cannot be read")
        return f"{name if value is None else f'{name}={value}'}: {_ended(said)}"
    return text.strip()


REASON = r"Value '|Invalid (value|type)|is not Optional|does not support deletion|Cannot (merge|convert 'list')"
"""Lines in which OmegaConf says what is wrong with a value."""


def _not_text(search: Sequence[str]) -> str:
    """Returns the yaml, of those of one's own, that is not UTF-8."""
    for folder in _folders(search):
        for path in sorted(folder.rglob("*.yaml")):
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return str(path)
    return "A yaml"


def _folders(search: Sequence[str]) -> list[Path]:
    """Returns the folders of a search path as it is written for Hydra."""
    return [Path(place.removeprefix("file://")) for override in search for place in _places(override)]


GONE = {
    "train.allow_targets": "unknown; the package of classes of your own is named with --plugin PACKAGE on the command "
    "line, or by its installed entry point (docs/plugins.md)."
}
"""Keys of earlier versions → what stands in their place."""


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith(("?", ".")) else f"{sentence}."


def _wrong_yaml(name: str, text: str, reason: str, search: Sequence[str], overrides: Sequence[str]) -> str:
    """`experiment/mine`: a yaml that does not fit into the config."""
    group = name.partition("/")[0]
    match = re.search(r"full_key: (\S+)", text)
    key = match.group(1) if match else ""
    if key == group != "task" and "not in '" in text:
        return f"{name}.yaml: its first line must be `# @package _global_`."
    if "not in '" in text:
        return f"{name}.yaml: {_unknown_key(key, search, [o for o in overrides if key_of(o) != group])}"
    return (
        f"{name}.yaml: {key}: {_ended(reason)}" if key and reason else f"{name}.yaml: contains no keys of the config."
    )


def _missing_option(option: str, search: Sequence[str]) -> str:
    """`peft/lroa`: names the group's options and the nearest one."""
    group, _, name = option.rpartition("/")
    options = group_options(group, _folders(search))
    more = (
        " A yaml of your own goes into task/ under --config-dir; folders need none: data.paths=[…]."
        if group == "task"
        else ""
    )
    known = f" Allowed: {', '.join(options)}." if options else ""
    hint = nearest(name, options) or "."
    return f"{group}={name}: unknown option {name!r} of the config group {group!r}{hint}{known}{more}"


def _unknown_key(key: str, search: Sequence[str], overrides: Sequence[str]) -> str:
    """`peft.rnk`: composes without the wrong override to see which keys its node has."""
    if key in MOVED_KEYS:
        return f"{key}: this key has moved; write {MOVED_KEYS[key]}=…"
    if key in GONE:
        return f"{key}: {GONE[key]}"
    if under(key, ("hydra",)):
        return f"{key}: unknown; Hydra has no such key in a run of mft."
    rest = [o for o in overrides if not under(key_of(o).split("@")[0], [key.split("@")[0]])]
    if "@" in key:
        group, _, package = key.partition("@")
        return f"{key}: no option of {group} is placed at {package!r}; choose one with {group}=…, without @."
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
        return f"{key}: {'.'.join(path)} is a single value and has no keys below it."
    if len(path) == len(key.split(".")):
        known = ", ".join(map(str, node)) or "none yet"
        return f"{key} is a mapping with the keys {known}; add a new one with +{key}.NAME=…"
    wrong = key.split(".")[len(path)]
    keys = [str(k) for k in node if not str(k).startswith("_")]
    if path == ["task"]:
        return f"{key}: {_not_chosen(wrong, keys)}"
    groups = [p.name for p in config_dir().iterdir() if p.is_dir()] if not path else []
    options = [*keys, *(g for g in groups if g not in keys)]
    where = f"{'.'.join(path)} has" if path else "the config has"
    hint = here(wrong) if wrong not in map(_last, _all_keys(cfg)) else ""
    hint = hint or nearest(wrong, options) or _elsewhere(wrong, cfg, similar=not path) or "."
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
        places.setdefault(_last(path), path)
    close = get_close_matches(wrong, places, n=1, cutoff=0.75) if similar else []
    name = wrong if wrong in places else next(iter(close), None)
    return f"; did you mean {places[name]}?" if name else ""


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    found = []
    for key in map(str, node) if isinstance(node, DictConfig) else ():
        path = f"{prefix}{key}"
        found += [path, *_all_keys(node._get_node(key), path + ".")]
    return found
