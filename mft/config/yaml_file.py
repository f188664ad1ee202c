"""Yaml files as they may come from anybody: judged in bounded time before they are loaded, with file and
line.

A few hundred bytes of aliases can stand for billions of values, and deep brackets end in a traceback of the
parser.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mft.errors import UserError

LARGEST = 2**20
"""Bytes of a file, and values that it may come to when its aliases are followed (a tenth of that many)."""

DEEPEST = 64
"""Mappings and lists inside each other."""

LONGEST_NUMBER = 400
"""Characters of a number; Python itself takes 4,300 digits, in quadratic time."""

_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "!")


def check(path: Path) -> None:
    """Raises UserError, with file and line, for a file that is not UTF-8, too large, or not plain, finite
    YAML."""
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: is larger than {LARGEST // 2**20} MiB; a config is text of a few pages.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: is not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8."
        ) from None
    try:
        _judge(path, text)
    except yaml.YAMLError as error:
        raise UserError(_refusal(path, error)) from error


def load(path: Path) -> Any:
    """Returns what a judged yaml file holds, without interpolations; UserError as `check`."""
    check(path)
    try:
        return yaml.load(
            path.read_text(encoding="utf-8-sig"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
    except yaml.YAMLError as error:
        raise UserError(_refusal(path, error)) from error


def register() -> None:
    """Makes Hydra judge every yaml file before it reads it. Safe to call twice."""
    from hydra._internal.core_plugins import file_config_source
    from hydra._internal.sources_registry import SourcesRegistry
    from omegaconf import DictConfig, OmegaConf

    class FileConfigSource(file_config_source.FileConfigSource):
        """Hydra's own source of yaml files, with `check` before."""

        def load_config(self, config_path: str) -> Any:
            file = Path(self.path, self._normalize_file_name(config_path))
            if file.is_file():
                check(file)
            try:
                found = super().load_config(config_path)
            except (ValueError, TypeError, AssertionError) as error:
                raise UserError(f"{file}: {' '.join(str(error).split())}.") from error
            last[:] = [file]
            defaults = found.config.get("defaults") if isinstance(found.config, DictConfig) else None
            if defaults is not None and not OmegaConf.is_list(defaults):
                raise UserError(
                    f"{file}: defaults: expected a list, such as `defaults: [override /peft: lora]`."
                )
            return found

    SourcesRegistry.instance().types["file"] = FileConfigSource


last: list[Path] = []
"""The file that Hydra read last; each is read once, so it is part of a circle of `defaults`."""


def circle() -> str:
    """Returns what is said where `defaults` never come to an end."""
    return f"{last[0] if last else 'defaults'}: its defaults lead back to itself."


def _judge(path: Path, text: str) -> None:
    sizes: dict[str, int] = {}  # anchor → values it stands for, aliases followed
    inside: list[tuple[str | None, int]] = []  # anchor of each open mapping or list, and the values before it
    opened: set[str] = set()
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        at = f"{path}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in opened:
                raise UserError(f"{at}: *{event.anchor} stands inside of what it names.")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent):
            if event.tag is not None and event.tag not in _TAGS:
                raise UserError(
                    f"{at}: the tag {event.tag} is unexpected; expected text, numbers, lists or mappings."
                )
            if isinstance(event, yaml.ScalarEvent):
                _check_number(event, at)
                total += 1
                if event.anchor:
                    sizes[event.anchor] = 1
            else:
                inside.append((event.anchor, total))
                total += 1
                if event.anchor:
                    opened.add(event.anchor)
                if len(inside) > DEEPEST:
                    raise UserError(f"{at}: more than {DEEPEST} lists and mappings stand inside each other.")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = inside.pop()
            if anchor:
                opened.discard(anchor)
                sizes[anchor] = total - before
        if total > LARGEST // 10:
            raise UserError(f"{at}: with its aliases the file comes to more than {LARGEST // 10:,} values.")


def _check_number(event: Any, at: str) -> None:
    if event.style is None and len(event.value) > LONGEST_NUMBER and re.match(r"[-+.]?\d", event.value):
        raise UserError(
            f"{at}: a number of {len(event.value):,} characters; expected at most {LONGEST_NUMBER}."
        )


def _refusal(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    line = f":{mark.line + 1}" if mark is not None else ""
    return f"{path}{line}: not valid YAML: {reason}."
