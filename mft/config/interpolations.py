"""Interpolations of a composed config: bounded in size before any is resolved, then all are replaced
except those of the environment.

`${oc.env:NAME}` is kept as written, so that no password is stored with a run, and read again in every rank.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.grammar_parser import parse
from omegaconf.resolvers import oc

from mft.config.refusals import ended, plainly
from mft.console import credentials
from mft.errors import UserError, nearest, shortened

LARGEST = 1_000_000
"""Characters and values that all interpolations may expand to, together."""

RESOLVERS = ("oc.env", "oc.select", "oc.decode", "now", "hydra")
"""What may stand before the colon of an interpolation, as far as a person may want it."""

_REFERENCE = re.compile(r"\$\{\s*(\.*[^${}:,\s]+)\s*\}")
_WORD = re.compile(r"[A-Za-z_][\w.\[\]]*")

_read: list[str] = []
"""Environment variables that OmegaConf has read since the list was last cleared."""


def register() -> None:
    """Makes OmegaConf's `oc.env` remember what it reads. Safe to call twice."""
    OmegaConf.register_new_resolver("oc.env", _variable, replace=True)


def _variable(name: str, *default: object) -> str | None:
    """OmegaConf's own resolver, with the name and the value remembered."""
    _read.append(name)
    if name in os.environ:
        credentials.remember(os.environ[name], name)
    return oc.env(name, *default)


def replaced(cfg: DictConfig) -> DictConfig:
    """Returns the config with every interpolation replaced, except those of the environment.

    Raises UserError that names an interpolation that cannot be resolved, is circular, or is too large.
    """
    bound(cfg)
    try:
        copy = OmegaConf.create(_plain(cfg))
    except MissingMandatoryValue as error:
        raise UserError(f"{_first_line(error)}.") from error
    except OmegaConfBaseException as error:
        raise UserError(refusal(error)) from error
    assert isinstance(copy, DictConfig)
    return copy


def check_variables(cfg: DictConfig) -> None:
    """Raises UserError for an environment variable that a frozen config reads and that is not set here."""
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(refusal(error)) from error


def bound(cfg: DictConfig) -> None:
    """Raises UserError for interpolations that are circular or expand to more than LARGEST."""
    try:
        size = _size(cfg, cfg, {}, {})
    except RecursionError:
        raise UserError("The config's interpolations are nested too deeply; write the values.") from None
    if size > LARGEST:
        raise UserError("The config's interpolations make more than a million characters; write the values.")


def _size(node: Any, root: DictConfig, sizes: dict[int, int], opened: dict[int, str]) -> int:
    """Returns the size of a node when resolved; each node is visited once.

    sizes: of the nodes visited so far, by id; opened: the nodes that lead to this one and their keys.
    """
    # OmegaConf resolves a node again wherever it is referenced, in exponential time; adding sizes up is
    # linear.
    if id(node) in sizes:
        return sizes[id(node)]
    value = node._value()
    opened[id(node)] = node._get_full_key(None) or "the config"
    total = 1
    if isinstance(value, str):
        total += len(value)
        if "${" in value:
            for key, surely in _references(value):
                target = _target(node, root, key)
                if target is None or (id(target) in opened and not surely):
                    continue
                if id(target) in opened:
                    way = [*opened.values(), opened[id(target)]]
                    way = way[way.index(opened[id(target)]) :]
                    raise UserError(f"{way[0]}: its interpolation leads back to itself ({' → '.join(way)}).")
                total += _size(target, root, sizes, opened)
    elif isinstance(node, DictConfig | ListConfig) and isinstance(value, dict | list):
        total += sum(_size(node._get_node(key), root, sizes, opened) for key in _keys(node))
    del opened[id(node)]
    # cut off, since a chain of doublings would otherwise make integers of thousands of digits
    sizes[id(node)] = min(total, LARGEST + 1)
    return sizes[id(node)]


def _references(text: str) -> Iterator[tuple[str, bool]]:
    """Yields the keys that a text refers to, and whether that is certain.

    Arguments of resolvers, and keys that are built from other keys, are only possible references.
    """
    for match in _REFERENCE.finditer(text):
        yield match[1], True
    if text.count("${") > len(_REFERENCE.findall(text)):
        for match in _WORD.finditer(text):
            yield match[0].rstrip("."), False
        if re.search(r"\$\{[^{}]*\$\{", text):
            yield "", False  # any key of the config


def _target(node: Any, root: DictConfig, key: str) -> Any:
    """Returns the node that a key leads to, or the interpolation on the way to it; None where there is
    none."""
    name = key.lstrip(".")
    target: Any = root if name == key else node
    for _ in range(len(key) - len(name)):
        target = target._get_parent() if target is not None else None
    for part in re.split(r"[.\[]", name) if name else ():
        part = part.rstrip("]")
        value = target._value() if target is not None else None
        if isinstance(value, dict):
            target = target._get_node(part, validate_access=False)
        elif isinstance(value, list) and part.isdigit():
            target = target._get_node(int(part)) if int(part) < len(value) else None
        else:
            return target if isinstance(value, str) else None
    return target


def _keys(node: Any) -> list[Any]:
    return list(node._value()) if isinstance(node, DictConfig) else list(range(len(node._value())))


def _plain(node: Any) -> Any:
    """Returns a container as plain values; enums stay."""
    values = [_leaf(node, key) for key in _keys(node)]
    return dict(zip(_keys(node), values, strict=True)) if isinstance(node, DictConfig) else values


def _leaf(node: Any, key: str | int) -> Any:
    if not OmegaConf.is_interpolation(node, key):
        if OmegaConf.is_missing(node, key):
            return "???"
        return _plain(node[key]) if OmegaConf.is_config(node[key]) else node[key]
    _read.clear()
    value = node[key]  # `_variable` notes in _read what this reads of the environment
    if OmegaConf.is_config(value):
        return _plain(value)
    if not _read:
        return _escaped(value)
    # A text such as ${data_dir}/${oc.env:RUN}: what does not come from the environment is replaced alone, by
    # setting the node to one part after the other.
    child = node._get_node(key)
    written = child._value()
    # OmegaConf's own grammar: the outermost interpolations, and what stands between them
    parts = [part.getText() for part in parse(written).getChild(0).getChildren()]
    if len(parts) == 1:
        return written
    try:
        return "".join(_part(node, key, child, part) for part in parts)
    finally:
        child._set_value(written)


def _part(node: Any, key: str | int, child: Any, part: str) -> str:
    """Returns the value of one part of a text, or the part as written if it reads the environment itself."""
    if not part.startswith("${"):
        return part
    _read.clear()
    child._set_value(part)
    try:
        value = node[key]
    except OmegaConfBaseException:  # part of a number, which alone is not one
        return part
    return part if _read else str(_escaped(value))


def _escaped(value: object) -> object:
    """Returns a value that is not resolved again when the config is read back."""
    if not isinstance(value, str) or "${" not in value:
        return value
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value)


def refusal(error: OmegaConfBaseException) -> str:
    """Returns the sentence for an interpolation that cannot be resolved: its key, the text, the nearest."""
    reason = _first_line(error)
    if match := re.search(r"nvironment variable '([^']+)' not found", reason):
        unset = f"the environment variable {match[1]} is not set, and ${{oc.env:{match[1]}}} reads it."
        return f"{error.full_key}: {unset}"
    setting = f"{error.full_key}={shortened(getattr(error.child_node, '_value', str)())[1:-1]}"
    if match := re.search(r"Interpolation key '(.+)' not found", reason):
        parent, dot, _ = match[1].rpartition(".")
        node = OmegaConf.select(error.parent_node._get_root(), parent) if error.parent_node else None
        names = [f"{parent}{dot}{key}" for key in map(str, node if isinstance(node, DictConfig) else ())]
        return f"{setting}: there is no key {match[1]!r}{nearest(match[1], names) or '.'}"
    if match := re.search(r"Unsupported interpolation type (\S+)", reason):
        hint = nearest(match[1], RESOLVERS) or "."
        return f"{setting}: there is no resolver {match[1]!r}{hint} Known: {', '.join(RESOLVERS)}."
    if match := re.search(r"While dereferencing interpolation '.+?': (.+)", reason):
        return f"{setting}: {ended(plainly(match[1]))}"
    if match := re.search(r"Error resolving key '(\.+.*)'", reason):
        return f"{setting}: {match[1]!r} leads out of the config; one dot is the mapping that holds the key."
    if re.search(r"^TypeError raised", reason):
        wrong = "the arguments of the resolver are wrong"
        return f"{setting}: {wrong}; write ${{oc.env:NAME}} or ${{oc.env:NAME,DEFAULT}}."
    return f"{setting}: {ended(reason)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
