"""Names and paths of a config that no file system takes: found while composing, not when a folder is made."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.errors import UserError, shortened

PART = 255
"""Bytes that a file system takes for one name."""

WHOLE = 4000
"""Bytes of a path; the system takes 4,095, with what is made inside a folder."""

ONE = ("data.template", "model.path", "train.prompts", "train.resume", "peft.path", "model.cache_dir")
FOLDERS = ("output_dir", "cache_dir", "tracking.mlflow.store", "tracking.tensorboard.dir")
"""Keys of one path; the folders are made."""


def check_name(name: str) -> None:
    """Raises UserError unless runs can be grouped under it: `outputs/<name>/`."""
    given = f"name={shortened(name)[1:-1]}"
    if name.startswith(("/", "~")) or set(name.split("/")) & {"", ".", ".."}:
        raise UserError(
            f"{given} must be a name for folders inside outputs/ and multirun/; the folder of a run is "
            f"output_dir=…"
        )
    _check_length(name, given)


def check_places(cfg: DictConfig) -> None:
    """Raises UserError for the name and the paths of a resolved config that no file system takes."""
    check_name(cfg.name)
    for key, value in _paths(cfg):
        _check_length(value, f"{key}={shortened(value)[1:-1]}")
    for key in FOLDERS:
        if folder := OmegaConf.select(cfg, key):
            _check_folder(Path(os.path.expanduser(folder)), key)


def _paths(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    for key in (*ONE, *FOLDERS):
        value: Any = (
            OmegaConf.select(cfg, key) if not OmegaConf.is_missing(cfg, key.partition(".")[0]) else None
        )
        if isinstance(value, str):
            yield key, value
    lists = {"data.paths": cfg.data.paths}
    for name, task in cfg.task.items():
        if isinstance(task, DictConfig):
            lists |= {f"task.{name}.{key}": task.get(key) for key in ("paths", "valid")}
    for key, values in lists.items():
        for value in values if OmegaConf.is_list(values) else ():
            if isinstance(value, str):
                yield key, value


def _check_length(path: str, given: str) -> None:
    if hidden := next((letter for letter in path if unicodedata.category(letter) == "Cc"), ""):
        raise UserError(f"{given}: contains the control character U+{ord(hidden):04X}.")
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    if longest > PART:
        raise UserError(f"{given}: a name of {longest:,} bytes; a file system takes at most {PART}.")
    if (whole := len(os.fsencode(path))) > WHOLE:
        raise UserError(f"{given}: a path of {whole:,} bytes; it must have at most {WHOLE:,}.")


def _check_folder(folder: Path, key: str) -> None:
    """A folder that is there or can be made, as far as that is known without making it."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{key}={folder}: {there} is not a folder.")
    if not os.access(there, os.X_OK if there == folder else os.W_OK | os.X_OK):
        raise UserError(f"{key}={folder}: nothing can be written in {there}: permission denied.")
