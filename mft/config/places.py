"""Names and paths of a config: made absolute, and checked against what a file system accepts."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from mft.data.template_choice import is_file
from mft.errors import UserError, shortened

LONGEST_PART = 255
"""Longest name in a path, in bytes."""

LONGEST_PATH = 4000
"""Longest path, in bytes; the limit of the system is 4,095, and files are created below it."""

ONE = ("data.template", "model.path", "train.prompts", "train.resume", "peft.path", "model.cache_dir")
FOLDERS = ("output_dir", "cache_dir", "tracking.mlflow.store", "tracking.tensorboard.dir")
"""Keys that hold one path; the folders are created."""


def check_name(name: str) -> None:
    """Raises UserError unless runs can be grouped under it: `outputs/<name>/`."""
    setting = f"name={shortened(name)[1:-1]}"
    if name.startswith(("/", "~")) or set(name.split("/")) & {"", ".", ".."}:
        raise UserError(
            f"{setting} must be a name for folders inside outputs/ and multirun/; the folder of a run is "
            "output_dir=…"
        )
    _check_length(name, setting)


def absolute_paths(cfg: DictConfig) -> DictConfig:
    """Makes a resolved config independent of the folder it was composed in; `~` is expanded.

    Raises UserError for names and paths that no file system accepts, and for folders that cannot be made.
    """
    check_name(cfg.name)
    for key in (*ONE, *FOLDERS):
        if isinstance(value := OmegaConf.select(cfg, key), str):
            _check_length(value, f"{key}={shortened(value)[1:-1]}")
            if not value and key in ("output_dir", "cache_dir"):
                raise UserError(f"{key} is empty; write the path of a folder, or leave it out.")
            if value and key in FOLDERS:
                check_folder(Path(os.path.expanduser(value)), key)
    cfg.output_dir, cfg.cache_dir = _absolute(cfg, "output_dir"), _absolute(cfg, "cache_dir")
    cfg.data.paths = _all_absolute(cfg.data.paths, "data.paths")
    if is_file(cfg.data.template):
        cfg.data.template = _absolute(cfg.data, "template")
    for name, task in cfg.task.items():
        for key in ("paths", "valid"):
            if isinstance(task, DictConfig) and OmegaConf.is_list(task.get(key)):
                task[key] = _all_absolute(task[key], f"task.{name}.{key}")
    return cfg


def _absolute(node: Any, key: str | int) -> str:
    value: str = node[key]
    path = os.path.expanduser(value)
    absolute = value if value.startswith("hf:") else os.path.abspath(path)  # hf: a data set of the hub
    if not OmegaConf.is_interpolation(node, key):
        return absolute
    # of a variable of the environment, which stays as it is written
    written = os.path.expanduser(node._get_node(key)._value())
    return written if absolute == path else os.path.join(os.getcwd(), written)


def _all_absolute(paths: ListConfig, key: str) -> list[str]:
    for path in paths:
        if not isinstance(path, str) or not path.strip():
            raise UserError(f"{key}: {shortened(path)} must be a path, in quotes where it is a number.")
        _check_length(path, f"{key}={shortened(path)[1:-1]}")
        if "://" in path:
            raise UserError(
                f"{key}={shortened(path)[1:-1]} is an address; download it and give the folder or file, or "
                "name a data set of the hub, hf:owner/name."
            )
    return [_absolute(paths, number) for number in range(len(paths))]


def _check_length(path: str, setting: str) -> None:
    if hidden := next((letter for letter in path if unicodedata.category(letter) == "Cc"), ""):
        raise UserError(f"{setting}: contains the control character U+{ord(hidden):04X}.")
    # File systems count bytes, of which a letter may take four.
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    if longest > LONGEST_PART:
        raise UserError(f"{setting}: a name of {longest:,} bytes; file systems take at most {LONGEST_PART}.")
    if (length := len(os.fsencode(path))) > LONGEST_PATH:
        raise UserError(f"{setting}: a path of {length:,} bytes; it must have at most {LONGEST_PATH:,}.")


def check_folder(folder: Path, key: str) -> None:
    """Checks that a folder exists or can be created, as far as that is known without creating it."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{key}={folder}: {there} is not a folder.")
    if not os.access(there, os.X_OK if there == folder else os.W_OK | os.X_OK):
        raise UserError(f"{key}={folder}: no permission to write in {there}.")
