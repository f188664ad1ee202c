"""Real input without a download site: a small pretrained model and five code tasks, made once in the cache folder.

<cache_dir>/demo/
    model/                     SmolLM2-135M-Instruct: safetensors, tokenizer, chat template
    tasks/<name>/train.jsonl   five tasks of chatML rows cut from this Python's standard library
    examples.jsonl             one held-out row per task, which is in no train.jsonl
    about.json                 where everything comes from, counts, licences; a part that is listed is complete
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

FORMAT = 1  # raised when rows or model change, so that an older cache is made again
ROLES = {"system": "system", "human": "user", "bot": "assistant"}

Progress = Callable[[str], None]


def folder(cache_dir: Path) -> Path:
    """Where the demo's input is."""
    return Path(cache_dir).expanduser() / "demo"


def make(cache_dir: Path, progress: Progress | None = None, model: bool = True) -> Path:
    """Makes what is missing of the demo's input (about a minute; nothing the second time) and returns its folder.

    Several processes may call it at once: one makes, the others wait. The tasks are those of the Python that made
    them first. `model=False` makes the tasks only; UserError when the model's package is not installed.
    """
    from filelock import FileLock

    root = folder(cache_dir)
    if complete(root, "tasks") and (not model or complete(root, "model")):
        return root
    say = progress or (lambda _: None)
    writable(root, "the cache folder (cache_dir, $MFT_CACHE)")
    with FileLock(root / ".lock"):
        if not complete(root, "tasks"):
            say("five tasks from the source of Python's standard library (about 20 seconds)")
            part(root, "tasks", make_tasks)
        if model and not complete(root, "model"):
            say("SmolLM2-135M-Instruct out of its GGUF file (about 30 seconds)")
            part(root, "model", make_model)
    return root


def describe(cache_dir: Path) -> list[tuple[str, int, int]]:
    """(task, samples, characters of all messages) for each task, for a table."""
    counts = about(made(cache_dir))["tasks"]["counts"]
    return [(task, count["samples"], count["characters"]) for task, count in counts.items()]


def examples(cache_dir: Path) -> dict[str, tuple[list[dict[str, str]], str]]:
    """The held-out row of each task: messages up to the answer (roles system, user, assistant), and the answer."""
    found = {}
    with open(made(cache_dir) / "examples.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            *asked, answer = row["chat_rounds"]
            messages = [{"role": ROLES[message["role"]], "content": message["content"]} for message in asked]
            found[row["data_name"]] = (messages, answer["content"])
    return found


def made(cache_dir: Path) -> Path:
    """The demo's folder; UserError when its tasks have not been made."""
    root = folder(cache_dir)
    if not complete(root, "tasks"):
        raise UserError(f"{root}: the demo's input has not been made; run `mft demo`")
    return root


def about(root: Path) -> dict[str, Any]:
    try:
        return json.loads((root / "about.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def complete(root: Path, name: str) -> bool:
    return about(root).get(name, {}).get("format") == FORMAT and (root / name).is_dir()


def part(root: Path, name: str, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Makes `root/name` in a temporary folder, moves it into place and lists it in about.json: then it is complete."""
    started = time.perf_counter()
    partial = root / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    facts = fill(partial)
    if (partial / "examples.jsonl").exists():  # beside the tasks, not among them: a task folder is read recursively
        os.replace(partial / "examples.jsonl", root / "examples.jsonl")
    shutil.rmtree(root / name, ignore_errors=True)  # of an older format, or not listed
    os.replace(partial, root / name)
    everything = about(root) | {name: {"format": FORMAT, "seconds": round(time.perf_counter() - started, 1)} | facts}
    written = root / "about.json.partial"
    written.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    os.replace(written, root / "about.json")


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
        raise UserError(f"{root}: this Python comes without the source of its standard library, the demo's text")
    rows, held_out, left_out = tasks.build(files, tests, root)
    for task, of_task in rows.items():
        if of_task:
            (partial / task).mkdir()
            write_jsonl(partial / task / "train.jsonl", of_task)
    write_jsonl(partial / "examples.jsonl", held_out)
    notes = [] if tests else ["no Lib/test in this Python: unit_test has doctests only"]
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "source": str(root),
        "license": "PSF-2.0 (source of Python's standard library; some modules carry compatible licences of their own)",
        "notes": notes + [f"{task}: nothing found" for task, of_task in rows.items() if not of_task],
        "counts": {
            task: {"samples": len(of_task), "characters": sum(map(tasks.characters, of_task))}
            for task, of_task in rows.items()
        },
        "left_out": left_out,
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
