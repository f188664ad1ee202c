"""A task: its name, its files, what a row means, its weight in the loss and its share of the mixture."""

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
from mft.data.detection import OWN_NAMES, recognise, unrecognised
from mft.data.formats import KNOWN, Auto, Format
from mft.data.readers import Rows, stem
from mft.data.row_fields import SKIP_ADVICE, RowError, must_be
from mft.data.task_files import DataFile, task_files
from mft.errors import UserError, check_ranges, nearest, ranged, shortened

FIRST_ROWS = 8
"""Rows of each file that are read before a run starts."""

NAME_CHARACTERS = 200
"""Characters of a task's name; trackers allow 250 for the name of a metric."""


@dataclass
class Task:
    """One of the tasks that are learned together.

    A subclass that reads other files overrides `data_files`: `files`, `splits`, `named_splits`, `rows` and
    `fingerprint`, and the places that rows are traced to, follow it.
    """

    public_name: ClassVar[str] = "task"

    name: str = ""
    """Its name in reports and metrics; "" = its key under `task`."""
    paths: list[str] = field(default_factory=list)
    """Folders (searched for data files, also below), files, or names of hub data sets. In a folder, files
    named for validation or test are not trained (`split.split_named`); a file that is given itself is."""
    valid: list[str] = field(default_factory=list)
    """The same for rows that only validate, whatever their names."""
    weight: float = ranged(1.0, min=0)
    """Weight in the loss."""
    share: float | None = ranged(None, min=0)
    """Part of the mixture under data.mixture=shares, relative to the other tasks; null = 1."""
    format: Any = field(default_factory=Auto)
    """A Format, or the name of one of conf/format."""
    hint: str = ""
    """What to do when a path is missing."""

    def named(self, name: str) -> Task:
        """Returns the task under this name, its format built where it was given by name.

        Raises UserError for values that types alone cannot refuse.
        """
        check_ranges(self, f"task.{name}")
        if not name.isprintable() or len(name) > NAME_CHARACTERS:
            limit = f"must be at most {NAME_CHARACTERS} printable characters"
            raise UserError(f"task.{name[:40]!r}.name: {limit}; metrics are named after it.")
        for key, paths in (("paths", self.paths), ("valid", self.valid)):
            if not all(path and isinstance(path, str) for path in paths):
                raise UserError(f"task.{name}.{key}={paths}: every entry must be the text of a path.")
        formats = {"auto": Auto(), **KNOWN}
        row_format = formats.get(self.format) if isinstance(self.format, str) else self.format
        if not isinstance(row_format, Format):
            hint = nearest(self.format, formats) or "."
            raise UserError(
                f"task.{name}.format={shortened(self.format)}: unknown format{hint} Allowed: "
                f"{', '.join(formats)}, or fields of your own names: {OWN_NAMES}."
            )
        return replace(self, name=name, format=row_format)

    @cached_property
    def data_files(self) -> list[DataFile]:
        """The files of the task in a fixed order, see `task_files`.

        Looked up once: a file that appears while the task is read must not shift the numbers of the others.
        """
        return task_files(self.paths, self.valid, self._at("paths"), self._at("valid"), self.hint)

    def files(self) -> list[Path]:
        """Returns the paths of `data_files`."""
        return [file.path for file in self.data_files]

    def splits(self) -> list[str]:
        """Returns what each of the files is for: valid, test, or "" where data.split decides."""
        return [file.split for file in self.data_files]

    def named_splits(self) -> list[str]:
        """Returns what each of the files is for by its own name; "" for those of `valid`."""
        return [file.named_split for file in self.data_files]

    def proportions(self, split: Sequence[float]) -> list[float]:
        """Returns data.split for the files that train: a split with its own files takes none of them."""
        train, valid, test = split
        own = set(self.splits())
        moved = (valid if "valid" in own else 0.0) + (test if "test" in own else 0.0)
        return [train + moved, 0.0 if "valid" in own else valid, 0.0 if "test" in own else test]

    def rows(self) -> Rows:
        """Returns the rows of all files: (file, line, parsed row or RowError)."""
        return Rows(self.files())

    def check_rows(self, stops: bool) -> None:
        """Reads the first rows of every text file, so that what is wrong with all of them shows before a run.

        stops: whether a bad row ends the run. Raises UserError for a file of another kind than its name says,
        where no format fits, and where `stops` RowError for the first bad row.
        """
        row_format: Format | None = None if isinstance(self.format, Auto) else self.format
        empty = []
        for file in self.files():
            if hub.is_name(file) or file.name.lower().endswith(".parquet"):
                continue  # slow to open, and no text in which a person could have made a mistake
            bad: list[tuple[int, RowError]] = []
            rows = list(islice(Rows([file]), FIRST_ROWS))
            empty += [] if rows else [file]
            for _, line, row in rows:
                try:
                    if isinstance(row, RowError):
                        raise row
                    if row_format is None and (match := recognise(row, self.name)):
                        row_format = match[1]
                    if row_format is not None:
                        row_format.messages(row)
                except RowError as error:
                    bad.append((line, error))
            if stops and bad:
                line, first = bad[0]
                raise first.at(file, line, SKIP_ADVICE if len(bad) < len(rows) else "")
            objects = [row for _, _, row in rows if isinstance(row, dict)]
            if stops and row_format is None and objects:
                raise unrecognised(objects[0], self.name)
            if stops and row_format is None and rows:
                raise must_be("", "an object with named fields", rows[0][2]).at(file, rows[0][1])
        if empty == self.files():
            raise UserError(
                f"{self._at('paths')}: {empty[0]} has no rows{', nor has another file' * (len(empty) > 1)}."
            )

    def find_format(self) -> tuple[str, Format]:
        """Returns the name of the format and the format; Auto finds it by the first row that one fits.

        Raises UserError where no row fits any. A task without a single object is left to the account of its
        rows, which names each of them.
        """
        if not isinstance(self.format, Auto):
            return self.format.describe(), self.format
        first: dict[str, Any] | None = None
        for _, _, row in self.rows():
            if match := recognise(row, self.name):
                return match
            if first is None and isinstance(row, dict):
                first = row
        if first is not None:
            raise unrecognised(first, self.name)
        return next(iter(KNOWN.items()))  # any will do: every row is refused with what is wrong with it

    def fingerprint(self, cache_dir: str | os.PathLike[str]) -> str:
        """Returns a hash of the contents of all files in order and of their splits, not of their names."""
        files, splits = self.files(), self.splits()
        digests = iter(file_digests([file for file in files if not hub.is_name(file)], Path(cache_dir)))
        parts = [hub.digest(str(file)) if hub.is_name(file) else next(digests) for file in files]
        trained = splits.count("")
        # Two ways to write the splits down: the first is older, and existing caches are found by it.
        if splits == [""] * trained + ["valid"] * (len(splits) - trained) and trained < len(splits):
            parts.insert(trained, "valid")
        elif any(splits):
            parts.append(",".join(splits))
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    def _at(self, key: str) -> str:
        """Returns where the config has a field of this task."""
        return f"task.{self.name}.{key}"


@dataclass
class FolderTask(Task):
    """A task made of one entry of `data.paths`."""

    def _at(self, key: str) -> str:
        return "data.paths"


def all_tasks(chosen: Mapping[str, Task], paths: Sequence[str]) -> list[Task]:
    """Returns the chosen tasks, named after their keys where they have no name, then one for each of `paths`.

    paths: `data.paths`, folders, files or data sets; the task is named after it, without suffixes. Raises
    UserError where two tasks would have the same name, with both origins, or where there is none at all.
    """
    tasks: dict[str, Task] = {}
    for key, task in chosen.items():
        name = task.name or key
        if name in tasks:
            raise UserError(
                f"task.{key}.name: {name!r} is already the name of another chosen task; names must differ"
            )
        tasks[name] = task.named(name)
    for path in paths:
        location = Path(os.path.normpath(Path(path).expanduser().absolute()))
        name = hub.task_name(path) if hub.is_name(path) else stem(location)
        if other := tasks.get(name):
            origin = "data.paths" if isinstance(other, FolderTask) else f"task.{name}"
            raise UserError(
                f"data.paths: {path} would be a second task named {name!r}, beside {origin} "
                f"({', '.join(other.paths)}); rename the folder, or choose one of them"
            )
        tasks[name] = FolderTask(paths=[str(path)]).named(name)
    if not tasks:
        raise UserError(
            "task: no task is chosen; choose some of conf/task, e.g. 'task=[docstring,completion]', or give "
            "folders of JSONL files with 'data.paths=[folder1,folder2]'"
        )
    return list(tasks.values())
