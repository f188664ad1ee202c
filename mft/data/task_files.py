"""The files behind the paths of a task, and what each of them is for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mft.data import hub
from mft.data.readers import SUFFIXES
from mft.data.split import split_named
from mft.errors import UserError, nearest

ENDINGS = ", ".join(f"*{suffix}" for suffix in SUFFIXES)


class DataFile(NamedTuple):
    """A file of rows, or a hub data set under the name that stands in the config."""

    path: Path
    split: str = ""
    """What it is for: valid, test, or "" (it trains, but for what data.split takes of it)."""
    named_split: str = ""
    """The same where the file's own name says so; "" for the files of `valid`."""


def task_files(
    paths: Sequence[str], valid: Sequence[str], key: str, valid_key: str, hint: str
) -> list[DataFile]:
    """Returns the files of `paths` and then those of `valid`: in their order, those of a folder sorted.

    A file that its name puts into a split and that `valid` names, too, belongs to `valid`. key, valid_key:
    where the config has them; hint: what to do when a path is missing. Raises UserError for a missing path
    (with the nearest existing name beside it), a folder without a data file, a file named twice, and where
    no file trains.
    """
    if not paths:
        raise UserError(f"{key}: is empty; allowed: folders with {ENDINGS} files, or such files")
    to_validate = [file for path in valid for file in _files_of(path, valid_key, hint)]
    # Compared by real paths: links and other spellings name the same file.
    real_valid = {os.path.realpath(file) for file in to_validate}
    files = []
    for path in paths:
        folder = Path(path).expanduser()
        for file in _files_of(path, key, hint):
            # A file that is given itself trains, whatever it is called; so does a hub data set.
            split = "" if file == folder else split_named(file.relative_to(folder))
            if not split or os.path.realpath(file) not in real_valid:
                files.append(DataFile(file, split, split))
    if all(file.split for file in files):
        names = ", ".join(file.path.name for file in files[:3])
        raise UserError(
            f"{key}: no file to train on: by their names all are for validation or test ({names}); to train "
            "on such files give the files themselves, not their folder."
        )
    files += [DataFile(file, "valid") for file in to_validate]
    seen: set[str] = set()
    for file, *_ in files:
        real = str(file) if hub.is_name(file) else os.path.realpath(file)
        if real in seen:
            raise UserError(f"{key}: {file} is named twice; its rows would count double")
        seen.add(real)
    return files


def _files_of(name: str, key: str, hint: str) -> list[Path]:
    """Returns the files of one path, those of a folder sorted."""
    if hub.is_name(name):
        return [Path(name)]
    path, advice = Path(name).expanduser(), f"; {hint}" if hint else ""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{key}: {path} does not exist{_beside(path)}{advice}")

    def unreadable(error: OSError) -> None:
        raise UserError(f"{key}: {error.filename} cannot be read: {error.strerror}") from error

    files: list[Path] = []
    other_endings: set[str] = set()
    visited: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in visited:  # a link back to a folder that was read already
            folders.clear()
            continue
        visited.add(real)
        for name in names:
            if name.lower().endswith(SUFFIXES):
                files.append(Path(folder, name))
            else:
                other_endings.add(os.path.splitext(name)[1].lower() or name)
    if not files:
        content = f"it holds: {', '.join(sorted(other_endings)[:8])}" if other_endings else "it is empty"
        arrays = "; to read a .json file with an array of rows, give the file itself"
        raise UserError(
            f"{key}: no {ENDINGS} file in the folder {path} ({content})"
            f"{arrays if '.json' in other_endings else ''}{advice}"
        )
    return sorted(files)


def _beside(path: Path) -> str:
    """Returns the nearest existing name beside the path, or which folder is missing."""
    parent = path.parent
    if not parent.is_dir():
        return f" (nor does {parent})"
    return nearest(path.name, (entry.name for entry in parent.iterdir()))
