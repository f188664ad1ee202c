"""Which experiment a run belongs to: a hash of its inputs, stored in parts so that differences can be named.

`mft.config.inputs` says what the parts are; `mft.run_folder` keeps them as identity.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mft.errors import UserError, shortened
from mft.files.json_file import read_json

Nested = Mapping[str, Any]
"""A config as nested mappings of plain values."""

VERSION = 2
"""Raised by every change of what enters an identity, and by every changed default or public name of a
component.

Runs of another version are read (show, compare, merge, generate) but not resumed: whether they are the same
experiment cannot be known. Version 1 is the identity.json without a version.
"""

EXTENDABLE = ("train.max_steps", "train.epochs")
"""A run with larger values of these is the same run, trained further."""

LONGEST = 300
"""Longest value, in characters, that a sentence shows in full; enough for a path."""

SHOWN = 6
"""Most differences that a sentence lists."""

CONTENTS = {
    "base model": ("the base model (its weights or config.json)", "model.path"),
    "tokenizer": ("the tokenizer, chat template or generation config of the base model", "model.path"),
    "code": ("the Python code that comes with the base model", "model.path"),
    "adapter": ("the adapter", "peft.path"),
    "template": ("the template file", "data.template"),
}
"""Name of a fingerprint, beside `task.<name>` → what it is of, and the key that says where that lies."""


@dataclass(frozen=True)
class Identity:
    """The inputs of a run. extended: hash of all of them, 40 hex digits; base: the same without the run's
    length."""

    extended: str
    base: str
    tasks: tuple[str, ...] = ()
    """Names of the tasks, in order: it decides the order of the samples."""
    choices: dict[str, str] = field(default_factory=dict)
    """Component path → public name, and the global batch."""
    values: dict[str, str] = field(default_factory=dict)
    """Dotted key → short hash of a value that is not the default; hashed, since a value may come from a
    secret."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """`task.<name>` and the names in CONTENTS → hash of what is read."""
    version: int = VERSION

    @classmethod
    def of(
        cls,
        tasks: Sequence[str],
        choices: Mapping[str, str],
        values: Mapping[str, object],
        fingerprints: Mapping[str, str],
    ) -> Identity:
        """Returns the identity of these inputs; values: plain, as JSON takes them."""
        # Ten digits are enough, since hashes are compared key by key.
        hashed = {key: _hash(value)[:10] for key, value in values.items()}
        shorter = {key: value for key, value in hashed.items() if key not in EXTENDABLE}
        extended = _hash([VERSION, list(tasks), choices, hashed, fingerprints])
        base = _hash([VERSION, list(tasks), choices, shorter, fingerprints])
        return cls(extended, base, tuple(tasks), dict(choices), hashed, dict(fingerprints))

    def as_json(self) -> dict[str, object]:
        """Returns what identity.json holds."""
        parts: dict[str, object] = {"tasks": list(self.tasks), "choices": self.choices, "values": self.values}
        hashes: dict[str, object] = {"version": self.version, "identity": self.extended, "base": self.base}
        return hashes | parts | {"fingerprints": self.fingerprints}

    @classmethod
    def from_json(cls, values: object) -> Identity | None:
        """Inverse of `as_json`; None for values of another shape. An identity without a version has hashes
        only."""
        kinds: dict[str, type] = {"identity": str, "base": str}
        version = values.get("version", 1) if isinstance(values, dict) else 0
        if version == VERSION:
            kinds |= {"tasks": list, "choices": dict, "values": dict, "fingerprints": dict}
        if not isinstance(values, dict) or not all(isinstance(values.get(k), t) for k, t in kinds.items()):
            return None
        extended, base, *parts = (values[key] for key in kinds)
        if version != VERSION:
            return cls(extended, base, version=version if isinstance(version, int) else 0)
        return cls(extended, base, tuple(parts[0]), *parts[1:])

    def require(self, read: Mapping[str, str], config: Nested) -> None:
        """Raises UserError where what a run has read is not what this identity records.

        read: some of the fingerprints, made after reading; config: the run's, to say where the contents lie.
        """
        if self.version != VERSION:
            raise UserError(
                f"This run was written by another version of mft {self.numbers()}, and cannot be resumed."
            )
        changed = [name for name, value in read.items() if self.fingerprints.get(name) != value]
        if changed:
            what = " and ".join(changed_content(name, config, config) for name in changed)
            raise UserError(
                f"{what} since this run was checked: it would not be the experiment that its identity.json "
                "records. Start the same command again; it is a new run then."
            )

    def numbers(self) -> str:
        """Returns the version of this identity and the one that is written now."""
        return f"(identity {self.version}; this one writes identity {VERSION})"


def identity_of(run_dir: Path) -> Identity | None:
    """Returns the identity of the run in a folder, None if it is missing or damaged."""
    return Identity.from_json(read_json(run_dir / "identity.json"))


def differences(there: Identity, here: Identity, then: Nested, now: Nested) -> tuple[str, str]:
    """Returns in words how an earlier run differs from this one: (in contents, in config), "" for not at all.

    then, now: their configs, as they may be shown.
    """
    contents: list[str] = []
    config: list[str] = []
    if set(there.tasks) != set(here.tasks):
        config.append(f"the tasks are {', '.join(there.tasks)} there and {', '.join(here.tasks)} here")
    elif there.tasks != here.tasks:
        order = f"{', '.join(there.tasks)} there, {', '.join(here.tasks)} here"
        contents.append(f"the order of the tasks has changed ({order})")
    for name in sorted({*there.fingerprints, *here.fingerprints}):
        old, new = there.fingerprints.get(name), here.fingerprints.get(name)
        # a task that only one of them has is named as such
        if old != new and not (name.startswith("task.") and None in (old, new)):
            contents.append(changed_content(name, then, now))
    # What lies below a task or component that differs as such would only repeat that.
    named = [f"task.{name}" for name in set(there.tasks) ^ set(here.tasks)]
    for key in sorted({*there.choices, *here.choices}):
        if there.choices.get(key) != here.choices.get(key) and not _below(key, named):
            config.append(
                f"{key}={there.choices.get(key, 'none')} there, {here.choices.get(key, 'none')} here"
            )
            named.append(key)
    for key in sorted({*there.values, *here.values}):
        if there.values.get(key) != here.values.get(key) and not _below(key, named):
            config.append(f"{key}={_at(then, key)} there, {_at(now, key)} here")
    return _listed(contents), _listed(config)


def changed_content(name: str, then: Nested, now: Nested) -> str:
    """Returns in words that the content behind a fingerprint has changed, and where it is."""
    if name.startswith("task."):
        task = name.removeprefix("task.")
        what, old, new = f"the data of task {task}", _paths(task, then), _paths(task, now)
    else:
        what, key = CONTENTS.get(name, (name, ""))
        old, new = _at(then, key), _at(now, key)
    if old == new:
        return f"{what} has changed ({new})" if new else f"{what} has changed"  # model=tiny has no path
    return f"{what} differs ({old} there, {new} here)"


def _below(key: str, paths: Iterable[str]) -> bool:
    return any(key == path or key.startswith(f"{path}.") for path in paths)


def _listed(sentences: Sequence[str]) -> str:
    more = f"; and {len(sentences) - SHOWN} more" if len(sentences) > SHOWN else ""
    return "; ".join(sentences[:SHOWN]) + more


def _at(config: Nested, key: str) -> str:
    """Returns the value of a dotted key as text; `default` where the config does not name it."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return "default"
        node = node[part]
    text = "null" if node is None else node if isinstance(node, str) else json.dumps(node, default=str)
    return text if len(text) <= LONGEST else shortened(text, LONGEST)


def _paths(task: str, config: Nested) -> str:
    """Returns where the rows of a task are."""
    for key, node in (config.get("task") or {}).items():
        if task in (key, node.get("name")):
            return ", ".join([*node.get("paths", []), *(node.get("valid") or [])])
    paths = [str(path) for path in (config.get("data") or {}).get("paths", [])]
    same_name = [path for path in paths if Path(path).name.split(".")[0] == task.split(".")[0]]
    return same_name[0] if same_name else ", ".join(paths)


def _hash(value: object) -> str:
    return hashlib.sha1(json.dumps(value, sort_keys=True).encode()).hexdigest()
