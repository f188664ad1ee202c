"""Yaml files from untrusted sources: checked in bounded time before they are loaded; errors name file and
line.

A few hundred bytes of aliases can expand to billions of values, and deep nesting crashes the parser.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from mft.errors import UserError

LARGEST = 2**20
"""Largest file in bytes; with its aliases followed, it may hold a tenth as many values."""

DEEPEST = 64
"""Levels of nested mappings and lists."""

LONGEST_NUMBER = 400
"""Characters of a number; Python itself takes 4,300 digits, in quadratic time."""

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, which is 10 times as fast, where PyYAML was built with it."""

_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "!")


def check(path: Path) -> str:
    """Returns the text of a file; UserError, with file and line, where it is not UTF-8, too large, or not
    plain, finite YAML."""
    data = check_size(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise UserError(f"{path}:{line}: is not UTF-8 (byte 0x{byte:02x}); save it as UTF-8.") from None
    try:
        _judge(path, text)
    except yaml.YAMLError as error:
        raise UserError(refusal(error, path)) from error
    return text


def check_size(path: Path) -> Path:
    """Returns the path of a file; UserError where it is too large for a config."""
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: is larger than {LARGEST // 2**20} MiB; a config has a few pages.")
    return path


def load(path: Path) -> Any:
    """Returns the content of a yaml file, interpolations unresolved; raises UserError as `check` does."""
    text = check(path)
    try:
        return yaml.load(text, Loader=LOADER)
    except yaml.YAMLError as error:
        raise UserError(refusal(error, path)) from error


def of_run(folder: Path) -> dict[str, Any]:
    """Returns the config of a run folder as it was written; {} where it cannot be read."""
    try:
        config = load(folder / "config.yaml")
    except (OSError, UserError):
        return {}
    return config if isinstance(config, dict) else {}


def refusal(error: yaml.YAMLError, path: Path | None = None) -> str:
    """Returns the sentence for what is not YAML; path: the file, where the error does not name it."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    line = f":{mark.line + 1}" if mark else ""
    return f"{path or (mark.name if mark else 'A yaml')}{line}: not valid YAML: {reason}."


def register() -> None:
    """Makes Hydra check every yaml file before reading it. Safe to call twice."""
    from hydra._internal.core_plugins import file_config_source
    from hydra._internal.sources_registry import SourcesRegistry
    from omegaconf import DictConfig, OmegaConf

    class FileConfigSource(file_config_source.FileConfigSource):
        """Hydra's own source of yaml files, with `check` before; a content is parsed once in a process."""

        def load_config(self, config_path: str) -> Any:
            file = Path(self.path, self._normalize_file_name(config_path))
            key = None
            if file.is_file():
                key = (self.provider, self.path, config_path, check_size(file).read_bytes())
                if key in parsed:
                    last[:] = [file]
                    return copy.deepcopy(parsed[key])
                check(file)
            try:
                result = super().load_config(config_path)
            except (ValueError, TypeError, AssertionError) as error:
                raise UserError(f"{file}: {' '.join(str(error).split())}.") from error
            last[:] = [file]
            defaults = result.config.get("defaults") if isinstance(result.config, DictConfig) else None
            if defaults is not None and not OmegaConf.is_list(defaults):
                raise UserError(f"{file}: defaults: expected a list: `defaults: [override /peft: lora]`.")
            if key:
                parsed[key] = copy.deepcopy(result)
            return result

    SourcesRegistry.instance().types["file"] = FileConfigSource


parsed: dict[tuple[str, str, str, bytes], Any] = {}
"""Source, folder, name and content of a file → what it was parsed to: a sweep reads conf/ for every job, and
parsing is most of reading."""

last: list[Path] = []
"""The file that Hydra read last."""


def _judge(path: Path, text: str) -> None:
    """Reads the parser's events, which come before any value is built: there, aliases cost nothing."""
    sizes: dict[str | None, int] = {}  # anchor → values it stands for, aliases followed
    open_nodes: list[tuple[str | None, int]] = []  # anchor of each open mapping or list, values before it
    total = 0
    for event in yaml.parse(text, Loader=LOADER):
        at = f"{path}:{event.start_mark.line + 1}"
        if total == 0 and isinstance(event, yaml.SequenceStartEvent | yaml.ScalarEvent):
            found = "a list" if isinstance(event, yaml.SequenceStartEvent) else "one value"
            raise UserError(f"{at}: contains no keys but {found}; write KEY: VALUE on each line.")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_nodes]:
                raise UserError(f"{at}: *{event.anchor} stands inside the value it refers to.")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent):
            if event.tag is not None and event.tag not in _TAGS:
                raise UserError(
                    f"{at}: the tag {event.tag} is unexpected; write text, numbers, lists or mappings."
                )
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, total))
            else:
                length = 0 if event.style else len(event.value)  # a quoted one is text
                if length > LONGEST_NUMBER and re.match(r"[-+.]?\d", event.value):
                    raise UserError(f"{at}: a number of {length:,} characters, more than {LONGEST_NUMBER}.")
                sizes[event.anchor] = 1
            total += 1
            if len(open_nodes) > DEEPEST:
                raise UserError(f"{at}: more than {DEEPEST} levels of nested lists and mappings.")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = total - before
        if total > LARGEST // 10:
            raise UserError(f"{at}: with its aliases, the file holds more than {LARGEST // 10:,} values.")
