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
from mft.config.interpolations import refusal
from mft.config.other_trainers import setting_here
from mft.config.overrides import MOVED_KEYS, SEVERAL, group_options, groups, key_of
from mft.config.refusals import REASON, ended, plainly
from mft.config.schema import config_dir
from mft.errors import UserError, nearest, no_path

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
        if not any(o.startswith("+") and key_of(o) == group for o in overrides):
            return (
                f"{group}: a yaml chooses a second option; write `defaults: [override /{group}: NAME]` there."
            )
        return f"+{group}: an option of this group is already chosen; write {group}=… without the plus."
    if match := re.search(r"Sweep parameters '(.+)' requires --multirun", text):
        return f"{match.group(1)}: several values make a sweep: mft train -m '{match.group(1)}'."
    if match := re.search(r"Error resolving interpolation '(.+)', possible", text):
        override = next(o for o in overrides if match.group(1) in o)
        options = ", ".join(group_options(key_of(override)))
        return f"{override}: expected the name of an option, not an interpolation. Allowed: {options}."
    if match := re.search(r"An item is already at '([^']+)'", text):
        word = next(o for o in overrides if o.startswith("+") and key_of(o) == match.group(1))
        return f"{word}: the config has this key; write {word.lstrip('+')}, without the plus."
    if match := re.search(r"Could not delete '([^']+)'", text):
        return f"~{match.group(1)}: no option of this group is chosen, so there is none to remove."
    if match := re.search(r"Could not delete.+\n?.*'([^']+)' (?:does not exist|is )", text):
        return _unknown_key(match.group(1), search, overrides)
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        among = re.search(r"Available options in '([^']+)':\n((?:\t\S+\n)+)", text)
        return _missing_option(match.group(1), search, *(among.groups() if among else ("", "")))
    if match := re.search(r"Could not override '([^']+)'", text):
        inner = re.search(rf"full_key: ({re.escape(match.group(1))}\.\S+)", text)  # of train={sed: 1}
        return _unknown_key((inner or match).group(1).removeprefix("/"), search, overrides)
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
            return f"{name}.yaml: {key}: {ended(reason)}"
        return f"{name}.yaml: contains no keys of the config."
    if match := re.search(r"Error merging override (.+)", text):
        override = match.group(1)
        if reason.startswith("must be a list") and key_of(override) in ("train", "launch", "data"):
            reason = "must be a mapping, such as {a: 1}"
        return f"{override}: {ended(reason)}" if reason else _unknown_key(key_of(override), search, overrides)
    if key:
        if "not in '" in text:
            return _unknown_key(key, search, overrides)
        values = [f"{key}={o.split('=', 1)[1]}" for o in overrides if key_of(o) == key]
        return f"{values[-1] if values else key}: {ended(reason or lines[0])}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return refusal(error)
    if match := re.search(r"Interpolation key '(.+)' not found", text):  # of --resolve, which names no place
        where = next((o for o in overrides if f"${{{match.group(1)}}}" in o), "The config")
        return f"{where}: there is no key {match.group(1)!r}."
    return text.strip()


def _missing_option(option: str, search: Sequence[str], above: str, listed: str) -> str:
    """Of `peft/lroa`: names the group's options and the nearest one.

    above: the group that Hydra knows on the way to it, of which it has `listed` options, one a line.
    """
    group, _, name = option.rpartition("/")
    folders = [Path(place.removeprefix("file://")) for override in search for place in places_of(override)]
    if not (options := group_options(group, folders)) and above:  # experiment/nowhere, hydra/launcher
        group, name = above, option.removeprefix(f"{above}/")
        options = group_options(group, folders) or listed.split()
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
    if "/" in key:
        return f"{key}: a key is names joined by dots; did you mean {key.replace('/', '.')}?"
    wrong_ones = (group, "hydra.searchpath")  # of which `search` takes the place
    sound = [o for o in overrides if not under(key_of(o).split("@")[0], wrong_ones) and "={" not in o]
    try:
        cfg = compose_words([*search, *sound])
    except Exception:  # another override is wrong as well
        return f"There is no key {key!r}{nearest(key, groups()) or '.'}"
    node: Any = cfg
    parts = key.split(".")
    depth = 0
    while depth < len(parts) and isinstance(node, DictConfig) and parts[depth] in node:
        node = node._get_node(parts[depth])
        depth += 1
    path = ".".join(parts[:depth])
    if depth == len(parts) and not isinstance(node, DictConfig):
        return f"~{key}: a setting cannot be removed; leave it as it is, or set another value."
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
    where = path or "the config"
    options = group_options(path) if path in groups() else []
    if path == "tracking" and wrong in options:
        return f"{key}: {wrong} is not chosen; tracking=[{', '.join([*names, wrong])}] chooses it."
    if path in groups() and path not in SEVERAL:
        where = f"{path}={cfg.choices[path]}"
    having = [option for option in options if wrong in _keys_of(path, option)]
    hint = f", which {path}={', '.join(having)} {'has' if len(having) == 1 else 'have'}." if having else ""
    hint = hint or _nearest_key(wrong, names, cfg, similar=not path) or "."
    return f"{key}: {where} has no key {wrong!r}{hint} Allowed: {', '.join(names) or 'none'}."


def _keys_of(group: str, option: str) -> set[str]:
    """Returns the keys that an option of conf/ has, those of the yamls that it includes as well."""
    values = yaml_file.load(config_dir() / group / f"{option}.yaml")
    included = [name for name in values.pop("defaults", ()) if isinstance(name, str) and name != "_self_"]
    return set(values).union(*(_keys_of(group, name) for name in included))


def _nearest_key(wrong: str, names: Sequence[str], cfg: DictConfig, similar: bool) -> str:
    """Returns "; did you mean optimizer.lr?": what another trainer calls `wrong`, one of `names` like it, or
    a key of that name elsewhere in the config. similar: whether one like it elsewhere counts, too."""
    places: dict[str, str] = {}
    for path in sorted(_all_keys(cfg), key=lambda path: not path.startswith("train.")):
        places.setdefault(path.rpartition(".")[2], path)
    # A name that the config has itself, such as `seed`, means that one.
    if ours := (places.get(wrong) if similar else "") if wrong in places else setting_here(wrong):
        return f"; did you mean {ours}?"
    if hint := nearest(wrong, names):
        return hint
    exact = [wrong] if wrong in places else []
    close = get_close_matches(wrong, places, n=1, cutoff=0.75) if similar else exact
    return f"; did you mean {places[close[0]]}?" if close else ""


def _all_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key in map(str, node) if isinstance(node, DictConfig) else ():
        yield f"{prefix}{key}"
        yield from _all_keys(node._get_node(key), f"{prefix}{key}.")
