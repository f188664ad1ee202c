"""A task: a name, the files that hold its rows, what a row means, and its weight in the loss."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from mft.data.fingerprint import file_digests
from mft.data.formats import Chat, Format, RowError
from mft.errors import UserError, nearest

BOM = b"\xef\xbb\xbf"


@dataclass
class Task:
    """One of the tasks that are learned together.

    name: its name in reports and metrics; "" = its key under `task`. paths: folders (searched for *.jsonl, also below)
    and files, each line a JSON row. weight: weight in the loss. format: a Format. hint: what to do when one is missing.
    """

    name: str = ""
    paths: list[str] = field(default_factory=list)
    weight: float = 1.0
    format: Any = field(default_factory=Chat)
    hint: str = ""

    def files(self) -> list[Path]:
        """Returns the task's JSONL files: paths in the given order, the files of a folder sorted.

        Raises UserError for a missing path (with the nearest existing name beside it), a folder without a *.jsonl file,
        a file named twice.
        """
        if not self.paths:
            raise UserError(f"task.{self.name}.paths: is empty; allowed: folders with *.jsonl files, or such files")
        files = [file for path in self.paths for file in self._files_of(Path(path).expanduser())]
        seen: set[str] = set()
        for file in files:
            real = os.path.realpath(file)
            if real in seen:
                raise UserError(f"task.{self.name}.paths: {file} is named twice; its rows would count double")
            seen.add(real)
        return files

    def rows(self) -> Iterator[tuple[Path, int, Any]]:
        """Yields (file, line number from 1, parsed row) of every line that is not blank.

        Where a line is not valid JSON in UTF-8 the third is the RowError that says so, instead of being raised: the
        caller decides whether to stop. A byte order mark at the start of a file and CRLF line ends are accepted.
        """
        for file in self.files():
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if number == 1:
                        line = line.removeprefix(BOM)
                    if line.strip():
                        yield file, number, _parsed(line, file, number)

    def fingerprint(self, cache_dir: str | os.PathLike[str]) -> str:
        """Returns a hash of the contents of all files in order; names and places of the files do not enter."""
        return xxhash.xxh3_128_hexdigest("\n".join(file_digests(self.files(), Path(cache_dir))).encode())

    def _files_of(self, path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise UserError(f"task.{self.name}.paths: {path} does not exist{_beside(path)}{self._advice()}")
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
                suffix = os.path.splitext(name)[1].lower()
                if suffix == ".jsonl":
                    files.append(Path(folder, name))
                else:
                    others.add(suffix or name)
        if not files:
            found = f" (it holds: {', '.join(sorted(others)[:8])})" if others else " (it is empty)"
            raise UserError(f"task.{self.name}.paths: no *.jsonl file in the folder {path}{found}{self._advice()}")
        return sorted(files)

    def _unreadable(self, error: OSError) -> None:
        raise UserError(f"task.{self.name}.paths: {error.filename} cannot be read: {error.strerror}") from error

    def _advice(self) -> str:
        return f"; {self.hint}" if self.hint else ""


def all_tasks(chosen: Mapping[str, Task], paths: Sequence[str]) -> list[Task]:
    """Returns the chosen tasks, named after their keys where they have no name, and after them one for each of `paths`.

    Raises UserError where two tasks would have the same name, or where there is none at all.
    """
    tasks: dict[str, Task] = {}
    for key, task in chosen.items():
        name = task.name or key
        if name in tasks:
            raise UserError(f"task.{key}.name: {name!r} is already the name of another chosen task; names must differ")
        tasks[name] = replace(task, name=name)
    tasks |= {task.name: task for task in tasks_from_paths(paths, list(tasks.values()))}
    if not tasks:
        raise UserError(
            "task: no task is chosen; choose some of conf/task, e.g. 'task=[docstring,completion]', or give folders "
            "of JSONL files with 'data.paths=[folder1,folder2]'"
        )
    return list(tasks.values())


def tasks_from_paths(paths: Sequence[str], taken: Sequence[Task], format: Format | None = None) -> list[Task]:
    """Returns a task for each folder or JSONL file of `data.paths`, named after it (a file without its suffix).

    taken: the tasks there already are. Raises UserError with both origins where a name comes twice.
    """
    origins = {task.name: f"task.{task.name} ({', '.join(task.paths)})" for task in taken}
    tasks = []
    for path in paths:
        place = Path(path).expanduser().absolute()
        name = place.stem if place.suffix.lower() == ".jsonl" else Path(os.path.normpath(place)).name
        if name in origins:
            raise UserError(
                f"data.paths: {path} would be a second task named {name!r}, beside {origins[name]}; rename the folder, "
                "or choose one of them"
            )
        origins[name] = f"data.paths ({path})"
        tasks.append(Task(name=name, paths=[str(path)], format=format or Chat()))
    return tasks


def _parsed(line: bytes, file: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: byte {line[error.start : error.start + 1]!r} at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        around = error.doc[max(0, error.pos - 20) : error.pos + 20].strip()
        problem = f"is not JSON: {error.msg} at character {error.pos}, near {around!r}"
    except RecursionError:
        problem = "is not usable: its JSON is nested too deeply"
    except ValueError as error:  # e.g. an integer of more digits than Python converts
        problem = f"is not usable: {error}"
    return RowError("", problem, file, number)


def _beside(path: Path) -> str:
    """Returns the nearest existing name in the folder that would hold the path, or which folder is missing."""
    parent = path.parent
    if not parent.is_dir():
        return f" (nor does {parent})"
    return nearest(path.name, (entry.name for entry in parent.iterdir()))
