"""What Hydra, OmegaConf and the yaml parser refuse, said as a sentence: the key, what is allowed, the nearest
match.

The patterns are those of Hydra 1.3 and OmegaConf 2.3; `tests/config/test_compose.py` holds every case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import AnyNode, DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mft.config.hydra_compose import compose_words, places_of
from mft.config.inputs import under
from mft.config.other_trainers import here
from mft.config.overrides import MOVED_KEYS, group_options, key_of
from mft.config.schema import config_dir
from mft.errors import nearest, plainly


def of_defaults(error: Exception) -> str | None:
    """Returns the sentence for a `defaults` in a yaml that Hydra cannot read, None for errors of another
    kind."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename.endswith(("defaults_list.py", "config_repository.py")):
            reason = " ".join(str(error).split())
            return f"The defaults of a yaml cannot be read: {reason}. Write a list such as `- override /peft: lora`."
        frame = frame.tb_next
    return None


def refusals() -> tuple[type[Exception], ...]:
    """Returns what is raised while composing where the command line or a yaml is wrong; `explain` says it."""
    from hydra.errors import HydraException

    return HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError


def explain(error: Exception, search: Sequence[str], overrides: Sequence[str]) -> str:
    """Returns a sentence for what was refused while composing: the key, what is allowed, the nearest
    match."""
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
        return (
            f"{given}: several values make a sweep, mft train -m {given}; for a list write {key}=[{values}]."
        )
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


REASON = (
    r"Value '|Invalid (value|type)|is not Optional|does not support deletion|Cannot (merge|convert 'list')"
)
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
    return [Path(place.removeprefix("file://")) for override in search for place in places_of(override)]


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
        f"{name}.yaml: {key}: {_ended(reason)}"
        if key and reason
        else f"{name}.yaml: contains no keys of the config."
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
        cfg: Any = compose_words([*search, *rest])
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
        return f"{key}: {task_not_chosen(wrong, keys)}"
    groups = [p.name for p in config_dir().iterdir() if p.is_dir()] if not path else []
    options = [*keys, *(g for g in groups if g not in keys)]
    where = f"{'.'.join(path)} has" if path else "the config has"
    hint = here(wrong) if wrong not in map(_last, _all_keys(cfg)) else ""
    hint = hint or nearest(wrong, options) or _elsewhere(wrong, cfg, similar=not path) or "."
    return f"{key}: {where} no key {wrong!r}{hint} Allowed: {', '.join(options) or 'none'}."


def task_not_chosen(wrong: str, chosen: Sequence[str]) -> str:
    return (
        f"no task {wrong!r} is chosen{nearest(wrong, chosen) or '.'} Chosen: {', '.join(chosen) or 'none'}; "
        "task=[NAME] chooses one that has a yaml, and a folder of data.paths has no settings of its own."
    )


def _elsewhere(wrong: str, cfg: DictConfig, similar: bool) -> str:
    """Returns "; did you mean optimizer.lr?" where a key of this name (or one like it) stands in another
    place."""
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
