"""A task: a name, the files of its rows, what a row means, its weight in the loss and its share of the
mixture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from mft.data import hub
from mft.data.cache.fingerprint import file_digests
from mft.data.formats import KNOWN, Auto, Format, RowError, misread, no_format
from mft.data.readers import SUFFIXES, Rows, is_data, stem
from mft.data.split import split_named
from mft.errors import UserError, check_ranges, nearest, ranged, shortened

FIRST_ROWS = 8
"""Rows of each file that are read before a run starts."""

NAME_CHARACTERS = 200
"""Characters of a task's name; trackers allow 250 for the name of a metric."""

_ENDINGS = ", ".join(f"*{suffix}" for suffix in SUFFIXES)


@dataclass
class Task:
    """One of the tasks that are learned together.

    name: its name in reports and metrics; "" = its key under `task`. paths: folders (searched for data files,
    also below), files, or names of hub data sets. In a folder, files that are named for validation or test
    are not trained (see `splitnames`); a file that is given itself is not judged by its name. valid: the same
    for rows that only validate, whatever their names. weight: weight in the loss. share: part of the mixture
    under data.mixture=shares, relative to the other tasks; None = 1. format: a Format, or the name of one of
    conf/format. hint: what to do when a path is missing.
    """

    public_name: ClassVar[str] = "task"

    name: str = ""
    paths: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    weight: float = ranged(1.0, min=0)
    share: float | None = ranged(None, min=0)
    format: Any = field(default_factory=Auto)
    hint: str = ""

    def named(self, name: str) -> Task:
        """Returns the task under this name, its format built where it was given by name.

        Raises UserError for values that types alone cannot refuse.
        """
        check_ranges(self, f"task.{name}")
        if not name.isprintable() or len(name) > NAME_CHARACTERS:
            raise UserError(
                f"task.{name[:40]!r}.name: must be at most {NAME_CHARACTERS} printable characters; metrics "
                "are named after it."
            )
        for key in ("paths", "valid"):
            if not all(path and isinstance(path, str) for path in getattr(self, key)):
                raise UserError(
                    f"task.{name}.{key}={getattr(self, key)}: every entry must be the text of a path."
                )
        return replace(self, name=name, format=_format(self.format, f"task.{name}.format"))

    def files(self) -> list[Path]:
        """Returns the files of `paths` and then those of `valid`: in the given order, the files of a folder
        sorted.

        A hub data set is one file, named as it was given. Raises UserError for a missing path (with the
        nearest existing name beside it), a folder without a data file, a file named twice.
        """
        if not self.paths:
            raise UserError(
                f"{self._at('paths')}: is empty; allowed: folders with {_ENDINGS} files, or such files"
            )
        files = [file for file, _ in self._listing]
        seen: set[str] = set()
        for file in files:
            real = str(file) if hub.is_name(file) else os.path.realpath(file)
            if real in seen:
                raise UserError(f"{self._at('paths')}: {file} is named twice; its rows would count double")
            seen.add(real)
        return files

    def splits(self) -> list[str]:
        """Returns what each of `files()` is for: valid, test, or "" (it trains, but for what data.split takes
        of it).

        Raises UserError where none trains.
        """
        files = self._listing
        if all(split for _, split in files):
            names = ", ".join(file.name for file, _ in files[:3])
            raise UserError(
                f"{self._at('paths')}: no file to train on: by their names all are for validation or test "
                f"({names}); to train on such files give the files themselves, not their folder."
            )
        return [split for _, split in files]

    def named_splits(self) -> list[str]:
        """Returns what each of `files()` is for by its name; those of `valid` need none."""
        validate = sum(len(self._files_of(path, "valid")) for path in self.valid)
        splits = self.splits()
        return splits[: len(splits) - validate] + [""] * validate

    def proportions(self, split: Sequence[float]) -> list[float]:
        """Returns data.split for the files that train: a split with files of its own takes no part of
        them."""
        train, valid, test = split
        own = set(self.splits())
        moved = (valid if "valid" in own else 0.0) + (test if "test" in own else 0.0)
        return [train + moved, 0.0 if "valid" in own else valid, 0.0 if "test" in own else test]

    def rows(self) -> Rows:
        """Returns the rows of all files: (file, line, parsed row or RowError)."""
        return Rows(self.files())

    def check_rows(self, stops: bool) -> None:
        """Reads the first rows of every file of text, so that what is wrong with all of them is known before
        a run.

        stops: whether a bad row ends the run. Raises UserError for a file of another kind than its name says,
        where no format fits, and where `stops` RowError for the first bad row.
        """
        row_format = None if isinstance(self.format, Auto) else self.format
        for file in self.files():
            if hub.is_name(file) or file.name.lower().endswith(".parquet"):
                continue
            bad: list[RowError] = []
            rows = list(islice(Rows([file]), FIRST_ROWS))
            for _, line, row in rows:
                try:
                    if isinstance(row, RowError):
                        raise row
                    if row_format is None and (found := self._found(row)):
                        row_format = found[1]
                    if row_format is not None:
                        row_format.messages(row)
                except RowError as error:
                    bad.append(error.at(file, line))
            objects = [row for _, _, row in rows if isinstance(row, dict)]
            if stops and bad:
                raise bad[0].advised() if len(bad) < len(rows) else bad[0]
            if stops and row_format is None and objects:
                raise UserError(f"task.{self.name}: {misread('', objects[0]) or no_format(list(objects[0]))}")

    def find_format(self) -> tuple[str, Format]:
        """Returns the name of the format and the format, which Auto finds by the task's first recognisable
        row.

        Raises UserError where no row fits any; a task without a single object is left to the account of its
        rows.
        """
        if not isinstance(self.format, Auto):
            return self.format.describe(), self.format
        first: dict[str, Any] | None = None
        for _, _, row in self.rows():
            if not isinstance(row, RowError) and (found := self._found(row)):
                return found
            if first is None and isinstance(row, dict):
                first = row
        if first is not None:
            raise UserError(f"task.{self.name}: {misread('', first) or no_format(list(first))}")
        return next(iter(KNOWN.items()))

    def _found(self, row: Any) -> tuple[str, Format] | None:
        found: tuple[str, Format] | None = self.format.detect(row)
        if found and (reason := misread(found[0], row)):
            raise UserError(f"task.{self.name}: {reason}.")
        return found

    def fingerprint(self, cache_dir: str | os.PathLike[str]) -> str:
        """Returns a hash of the contents of all files in order and the splits they are for, not of names and
        places."""
        files = self.files()
        digests = iter(file_digests([file for file in files if not hub.is_name(file)], Path(cache_dir)))
        parts = [hub.digest(str(file)) if hub.is_name(file) else next(digests) for file in files]
        splits = self.splits()
        trained = splits.count("")
        if splits == [""] * trained + ["valid"] * (len(splits) - trained) and trained < len(splits):
            parts.insert(trained, "valid")
        elif any(splits):
            parts.append(",".join(splits))
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    @cached_property
    def _listing(self) -> list[tuple[Path, str]]:
        """The files of `paths` with the splits that they are named for, and then those of `valid`; looked up
        once.

        A file that is named for a split in a folder of `paths` and given in `valid` as well is of `valid`.
        """
        validate = [file for path in self.valid for file in self._files_of(path, "valid")]
        given = {os.path.realpath(file) for file in validate}
        found: list[tuple[Path, str]] = []
        for path in self.paths:
            folder = Path(path).expanduser()
            files = self._files_of(path, "paths")
            found += [
                (file, "" if file == folder else split_named(file.relative_to(folder))) for file in files
            ]
        kept = [(file, split) for file, split in found if not split or os.path.realpath(file) not in given]
        return kept + [(file, "valid") for file in validate]

    def _files_of(self, given: str, key: str) -> list[Path]:
        """Returns the files of one path, those of a folder sorted."""
        if hub.is_name(given):
            return [Path(given)]
        path = Path(given).expanduser()
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise UserError(f"{self._at(key)}: {path} does not exist{_beside(path)}{self._advice()}")
        files: list[Path] = []
        others: set[str] = set()
        visited: set[str] = set()
        for folder, folders, names in os.walk(path, followlinks=True, onerror=self._unreadable):
            real = os.path.realpath(folder)
            if real in visited:  # a link back to a folder already read
                folders.clear()
                continue
            visited.add(real)
            for name in names:
                if is_data(name):
                    files.append(Path(folder, name))
                else:
                    others.add(os.path.splitext(name)[1].lower() or name)
        if not files:
            found = f" (it holds: {', '.join(sorted(others)[:8])})" if others else " (it is empty)"
            if ".json" in others:
                found += "; a .json file with an array of rows is read where it is given itself"
            raise UserError(
                f"{self._at(key)}: no {_ENDINGS} file in the folder {path}{found}{self._advice()}"
            )
        return sorted(files)

    def _unreadable(self, error: OSError) -> None:
        raise UserError(f"{self._at('paths')}: {error.filename} cannot be read: {error.strerror}") from error

    def _at(self, key: str) -> str:
        """Returns where the config says it."""
        return f"task.{self.name}.{key}"

    def _advice(self) -> str:
        return f"; {self.hint}" if self.hint else ""


@dataclass
class FolderTask(Task):
    """A task that one of `data.paths` makes."""

    def _at(self, key: str) -> str:
        return "data.paths"


def all_tasks(chosen: Mapping[str, Task], paths: Sequence[str]) -> list[Task]:
    """Returns the chosen tasks, named after their keys where they have no name, and after them one for each
    of `paths`.

    Raises UserError where two tasks would have the same name, or where there is none at all.
    """
    tasks: dict[str, Task] = {}
    for key, task in chosen.items():
        name = task.name or key
        if name in tasks:
            raise UserError(
                f"task.{key}.name: {name!r} is already the name of another chosen task; names must differ"
            )
        tasks[name] = task.named(name)
    tasks |= {task.name: task.named(task.name) for task in tasks_from_paths(paths, list(tasks.values()))}
    if not tasks:
        raise UserError(
            "task: no task is chosen; choose some of conf/task, e.g. 'task=[docstring,completion]', or "
            "give folders of JSONL files with 'data.paths=[folder1,folder2]'"
        )
    return list(tasks.values())


def tasks_from_paths(paths: Sequence[str], taken: Sequence[Task], format: Format | None = None) -> list[Task]:
    """Returns a task for each folder, file or data set of `data.paths`, named after it (a file without its
    suffixes).

    taken: the tasks there already are. Raises UserError with both origins where a name comes twice.
    """
    origins = {task.name: f"task.{task.name} ({', '.join(task.paths)})" for task in taken}
    tasks: list[Task] = []
    for path in paths:
        place = Path(os.path.normpath(Path(path).expanduser().absolute()))
        name = hub.task_name(path) if hub.is_name(path) else stem(place)
        if name in origins:
            raise UserError(
                f"data.paths: {path} would be a second task named {name!r}, beside {origins[name]}; rename "
                "the folder, or choose one of them"
            )
        origins[name] = f"data.paths ({path})"
        tasks.append(FolderTask(name=name, paths=[str(path)], format=format or Auto()))
    return tasks


def _format(given: Any, key: str) -> Format:
    """Returns a format that is given as one, or by the name of its yaml; raises UserError for anything
    else."""
    formats = {"auto": Auto(), **KNOWN}
    if isinstance(given, Format):
        return given
    if isinstance(given, str) and given in formats:
        return formats[given]
    raise UserError(
        f"{key}={shortened(given)}: unknown format{nearest(given, formats) or '.'} Allowed: "
        f"{', '.join(formats)}, or "
        "fields of your own names: format: {_target_: mft.data.formats.Pair, prompt: my_question, answer: "
        "my_answer}."
    )


def _beside(path: Path) -> str:
    """Returns the nearest existing name in the folder that would hold the path, or which folder is
    missing."""
    parent = path.parent
    if not parent.is_dir():
        return f" (nor does {parent})"
    return nearest(path.name, (entry.name for entry in parent.iterdir()))
