"""Turns what Hydra, OmegaConf and the yaml parser raise into one sentence: key, allowed values, nearest
match.

The patterns are those of Hydra 1.3 and OmegaConf 2.3; `tests/config/test_compose.py` holds every case.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import AnyNode, DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mft.config import yaml_file
from mft.config.hydra_compose import compose_words, places_of
from mft.config.inputs import under
from mft.config.other_trainers import setting_here
from mft.config.overrides import MOVED_KEYS, group_options, groups, key_of
from mft.errors import UserError, nearest, no_path

REFUSALS = (
    (r"could not be converted to Integer", "must be an integer"),
    (r"could not be converted to Float", "must be a number"),
    (r"is not a valid bool", "must be true or false"),
    (r"Cannot convert '\w+' to string|converted to String|is not a subclass of str", "must be a string"),
    (
        r"Invalid value assigned|DictConfig with ListConfig|to ListConfig|not a ListConfig",
        "must be a list, such as [a,b]",
    ),
    (r"is not a DictConfig|to DictConfig|subclass of [A-Z]|to Dict\[", "must be a mapping, such as {a: 1}"),
    (r"is not Optional|None to non-optional", "must not be null"),
    (r"does not support deletion", "a setting cannot be removed; leave it as it is, or set another value"),
)
"""Pattern in OmegaConf's message about a value → our words; the first match counts."""

REASON = (
    r"Value '|Invalid (value|type)|is not Optional|does not support deletion|Cannot (merge|convert 'list')"
)
"""Finds the line in which OmegaConf says what is wrong with a value."""

GONE = {
    "train.allow_targets": "unknown; a package of your own classes is allowed with --plugin PACKAGE on the "
    "command line, or by its installed entry point (docs/plugins.md)."
}
"""Keys of earlier versions → what replaces them."""


@contextmanager
def explained(search: Sequence[str], overrides: Sequence[str]) -> Iterator[None]:
    """Turns errors of composing into a UserError of one sentence; bugs pass through unchanged.

    search: the override of Hydra's search path, if any; overrides: the ones being composed.
    """
    from hydra.errors import HydraException

    try:
        yield
    except RecursionError:
        # Hydra follows `defaults` until Python's stack ends, but reads each file once: the last is part of
        # the circle.
        file = yaml_file.last[0] if yaml_file.last else "defaults"
        raise UserError(f"{file}: its defaults lead back to itself.") from None
    except YAMLError as error:  # of packages of yamls; `yaml_file` judges those of folders
        raise UserError(yaml_file.refusal(error)) from error
    except UnicodeDecodeError as error:
        raise UserError("A yaml is not text in UTF-8; save it as UTF-8.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error, search, overrides)) from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        if (refusal := no_path(error)) is not None:
            raise refusal from error
        # Hydra trips over a `defaults` that it cannot read wherever it happens to look at it first.
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not any(file.endswith(("defaults_list.py", "config_repository.py")) for file in files):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"The defaults of a yaml cannot be read: {reason}. Write a list such as `- override /peft: lora`."
        ) from error


def plainly(refusal: str) -> str:
    """Returns OmegaConf's message about a value in plain words, e.g. "must be an integer"."""
    if match := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", refusal):
        value, options = match.groups()
        return f"must be one of {options}{nearest(value, options.split(', '))}"
    return next((plain for pattern, plain in REFUSALS if re.search(pattern, refusal)), refusal)


def task_not_chosen(wrong: str, chosen: Sequence[str]) -> str:
    """Returns the sentence for a setting of a task that was not chosen."""
    return (
        f"no task {wrong!r} is chosen{nearest(wrong, chosen) or '.'} Chosen: {', '.join(chosen) or 'none'}; "
        "task=[NAME] chooses one that has a yaml, and a folder of data.paths has no settings of its own."
    )


def _sentence(error: Exception, search: Sequence[str], overrides: Sequence[str]) -> str:
    # OmegaConf names the key, Hydra, which wraps it, the override or the yaml: both texts are searched.
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if match := re.search(r"Ambiguous value for argument '(([^=]+)=(.*))'", text):
        word, key, values = match.groups()
        return f"{word}: several values make a sweep, mft train -m {word}; a list is {key}=[{values}]."
    if match := re.search(r"Multiple values for ([^.]+)\.|(\S+) appears more than once", text):
        group = match.group(1) or match.group(2)
        return f"+{group}: an option of this group is already chosen; write {group}=… without the plus."
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _missing_option(match.group(1), search)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match.group(1).removeprefix("/"), search, overrides)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = plainly(next((line for line in lines if re.search(REASON, line)), ""))
    match = re.search(r"full_key: (\S+)", text)
    key = match.group(1) if match else ""
    if match := re.search(r"In '([^']+)': \w+ raised", text):  # `experiment/mine`: a yaml does not fit
        name = match.group(1)
        group = name.partition("/")[0]
        if "not in '" in text:
            if key == group != "task":
                return f"{name}.yaml: its first line must be `# @package _global_`."
            return f"{name}.yaml: {_unknown_key(key, search, [o for o in overrides if key_of(o) != group])}"
        if key and reason:
            return f"{name}.yaml: {key}: {_ended(reason)}"
        return f"{name}.yaml: contains no keys of the config."
    if match := re.search(r"Error merging override (.+)", text):
        override = match.group(1)
        if reason.startswith("must be a list") and key_of(override) in ("train", "launch", "data"):
            reason = "must be a mapping, such as {a: 1}"
        return (
            f"{override}: {_ended(reason)}" if reason else _unknown_key(key_of(override), search, overrides)
        )
    if key:
        if "not in '" in text:
            return _unknown_key(key, search, overrides)
        override = next((f"{key}={o.split('=', 1)[1]}" for o in overrides if key_of(o) == key), key)
        return f"{override}: {_ended(reason or lines[0])}"
    return text.strip()


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith(("?", ".")) else f"{sentence}."


def _missing_option(option: str, search: Sequence[str]) -> str:
    """Of `peft/lroa`: names the group's options and the nearest one."""
    group, _, name = option.rpartition("/")
    folders = [Path(place.removeprefix("file://")) for override in search for place in places_of(override)]
    options = group_options(group, folders)
    sentence = f"{group}={name}: unknown option {name!r} of the config group {group!r}"
    sentence += nearest(name, options) or "."
    if options:
        sentence += f" Allowed: {', '.join(options)}."
    if group == "task":
        sentence += " Your own yaml goes into task/ under --config-dir; folders need none: data.paths=[…]."
    return sentence


def _unknown_key(key: str, search: Sequence[str], overrides: Sequence[str]) -> str:
    """Of `peft.rnk`: composes without the wrong override to see which keys its node has."""
    if key in MOVED_KEYS:
        return f"{key}: this key has moved; write {MOVED_KEYS[key]}=…"
    if key in GONE:
        return f"{key}: {GONE[key]}"
    if under(key, ("hydra",)):
        return f"{key}: unknown; Hydra has no such key in a run of mft."
    group, at, package = key.partition("@")
    if at:
        return f"{key}: no option of {group} is placed at {package!r}; choose one with {group}=…, without @."
    wrong_ones = (group, "hydra.searchpath")  # of which `search` takes the place
    try:
        cfg = compose_words(
            [*search, *(o for o in overrides if not under(key_of(o).split("@")[0], wrong_ones))]
        )
    except Exception:  # another override is wrong as well
        return f"There is no key {key!r}."
    node: Any = cfg
    parts = key.split(".")
    depth = 0
    while depth < len(parts) and isinstance(node, DictConfig) and parts[depth] in node:
        node = node._get_node(parts[depth])
        depth += 1
    path = ".".join(parts[:depth])
    if not isinstance(node, DictConfig):
        if type(node) is AnyNode and node._is_none():
            return f"{key}: {path} is null so far; a plus adds keys to it: +{key}=…"
        return f"{key}: {path} is a single value and has no keys below it."
    if depth == len(parts):
        keys = ", ".join(map(str, node)) or "none yet"
        return f"{key} is a mapping with the keys {keys}; add a new one with +{key}.NAME=…"
    wrong = parts[depth]
    names = [str(k) for k in node if not str(k).startswith("_")]
    if path == "task":
        return f"{key}: {task_not_chosen(wrong, names)}"
    if not path:
        names += [group for group in groups() if group not in names]
    where = f"{path} has" if path else "the config has"
    hint = _nearest_key(wrong, names, cfg, similar=not path) or "."
    return f"{key}: {where} no key {wrong!r}{hint} Allowed: {', '.join(names) or 'none'}."


def _nearest_key(wrong: str, names: Sequence[str], cfg: DictConfig, similar: bool) -> str:
    """Returns "; did you mean optimizer.lr?": what another trainer calls `wrong`, one of `names` like it, or
    a key of that name elsewhere in the config. similar: whether one like it elsewhere counts, too."""
    places: dict[str, str] = {}
    for path in _all_keys(cfg):
        places.setdefault(path.rpartition(".")[2], path)
    # A name that the config has itself, such as `seed`, means that one.
    if wrong not in places and (ours := setting_here(wrong)):
        return f"; did you mean {ours}?"
    if hint := nearest(wrong, names):
        return hint
    close = get_close_matches(wrong, places, n=1, cutoff=0.75) if similar else []
    name = wrong if wrong in places else next(iter(close), None)
    return f"; did you mean {places[name]}?" if name else ""


def _all_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key in map(str, node) if isinstance(node, DictConfig) else ():
        yield f"{prefix}{key}"
        yield from _all_keys(node._get_node(key), f"{prefix}{key}.")
