"""Five code tasks out of the standard library's source, as chatML rows: deterministic for one interpreter.

A function serves one task only, so that no answer of one task is read in another and validation losses stay
honest.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mft.demo.source import Function, functions
from mft.demo.unit_tests import from_docstrings, from_test_suite

CAPS = {"completion": 1_200, "docstring": 700, "function_body": 1_250, "function_name": 500, "unit_test": 600}
"""Rows of a task at most. Unequal, as real tasks are; together about 1 M SmolLM2 tokens with Python 3.11."""

PER_OWNER = 20
"""Rows a task takes from one class or from a module's functions, so that none becomes the subject."""

PER_ANSWER = {"unit_test": 3, "function_name": 2}
"""Tests of one target; functions of one name (there are dozens of `close`). Else an answer comes once."""

SEED = "mft-demo-1"
MAX_CHARACTERS = 5_000  # of a row's messages: about 1,700 SmolLM2 tokens at most
MASK = "____"

FAMILIAR = (
    *(
        "bisect",
        "calendar",
        "collections",
        "csv",
        "datetime",
        "fractions",
        "glob",
        "heapq",
        "html",
        "ipaddress",
    ),
    *(
        "json",
        "pathlib",
        "queue",
        "random",
        "shlex",
        "shutil",
        "statistics",
        "string",
        "tempfile",
        "textwrap",
        "uuid",
    ),
)
"""Subjects that most readers know: the held-out rows come from these where possible."""

SYSTEM = {
    "docstring": "You document Python code. Answer with the text of the docstring, without quotes.",
    "unit_test": "You write unit tests for Python code. Answer with the test only.",
}

WORDINGS = {
    "function_body": (
        "Implement this {kind}. Answer with the body only.\n\n{code}",
        "Please write the body of `{name}` so that it does what the docstring says.\n\n{code}",
        "{code}\n\nComplete this {kind}. I only need the code below the docstring.",
    ),
    "docstring": (
        "Write the docstring of this {kind}.\n\n{code}",
        "What would be a good docstring for `{name}`?\n\n{code}",
        "{code}\n\nDescribe what this {kind} does, as a docstring.",
    ),
    "completion": (
        "Continue this {kind} where it stops.\n\n{code}",
        "The code below breaks off in the middle of `{name}`. Write the rest of it.\n\n{code}",
        "{code}\n\nHow does `{name}` go on? Give me the remaining lines only.",
    ),
    "function_name": (
        "What is a good name for this {what}? Answer with the name only.\n\n{code}",
        f"Name this {{what}} (`{MASK}` stands for the name).\n\n{{code}}",
        f"{{code}}\n\nWhich name belongs in place of `{MASK}`?",
    ),
}
"""A task's prompts mean the same in several words, as those of people do."""

Row = dict[str, Any]


def build(
    files: Sequence[Path], tests: Sequence[Path], root: Path
) -> tuple[dict[str, list[Row]], list[Row], dict[str, int]]:
    """Makes the tasks from library source `files` and `tests` under `root`.

    Returns the rows of each task in the order of their ids; one held-out row per task, which is in no task;
    and how many functions and tests were left out, by reason.
    """
    left_out: Counter[str] = Counter()
    library = functions(files, root, left_out)
    candidates: dict[str, list[Row]] = {task: [] for task in CAPS}
    tested: set[str] = set()  # functions that a unit test's prompt shows serve no other task
    for row, shown in unit_test_rows(tests, library, left_out):
        candidates["unit_test"].append(row)
        tested.update(shown)
    for function in library:
        if function.path not in tested and (dealt := function_row(function, left_out)) is not None:
            candidates[dealt["data_name"]].append(dealt)
    rows = {task: select(task, candidates[task], left_out) for task in CAPS}
    examples = [held_out(of_task) for of_task in rows.values() if of_task]
    subjects = {example["source"] for example in examples}
    kept = {task: [row for row in of_task if row["source"] not in subjects] for task, of_task in rows.items()}
    return kept, examples, dict(sorted(left_out.items()))


def draw(*parts: object) -> float:
    """Returns a number in [0, 1) that depends on `parts` and the seed alone, in every process."""
    text = "\n".join([SEED, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def chat(task: str, source: str, human: str, bot: str, suffix: str = "") -> Row:
    """Returns a row; source: the dotted path of what it is about."""
    messages = [("system", SYSTEM[task])] if task in SYSTEM else []
    rounds = [{"role": role, "content": text} for role, text in (*messages, ("human", human), ("bot", bot))]
    return {"id": f"{task}/{source}{suffix}", "data_name": task, "source": source, "chat_rounds": rounds}


def block(code: str) -> str:
    """Returns code between fences."""
    return f"```python\n{code}\n```"


def characters(row: Row) -> int:
    """Returns the length of all messages."""
    return sum(len(message["content"]) for message in row["chat_rounds"])


def kind(function: Function) -> str:
    """Returns what a prompt calls a function."""
    return f"method of `{function.owner}`" if function.owner else f"function from `{function.module}`"


def function_row(function: Function, left_out: Counter[str]) -> Row | None:
    """Deals a function to one of four tasks and makes its row; None where it does not fit that task."""
    chance = draw("task", function.path)
    make: Callable[[Function], tuple[str, str] | None]
    if function.doc:
        make = function_body if chance < 0.42 else docstring if chance < 0.72 else completion
    else:
        make = completion if chance < 0.45 else function_name
    task = make.__name__
    if (made := make(function)) is None:
        left_out[f"unfit for {task}"] += 1
        return None
    wording = WORDINGS[task][int(draw("wording", function.path) * len(WORDINGS[task]))]
    what = "method" if function.owner else "function"
    human = wording.format(what=what, kind=kind(function), name=function.name, code=block(made[0]))
    return chat(task, function.path, human, made[1])


def function_body(function: Function) -> tuple[str, str] | None:
    """Signature and docstring → body."""
    fits = 20 <= len(function.doc) <= 1_500 and not function.doc.startswith("Internal")
    return (function.head(), function.body()) if fits else None


def docstring(function: Function) -> tuple[str, str] | None:
    """Code → the text of its docstring."""
    doc = function.doc
    fits = 25 <= len(doc) <= 700 and doc[0].isupper() and not doc.startswith("Internal")
    return (function.undocumented(), doc) if fits else None


def completion(function: Function) -> tuple[str, str] | None:
    """The first 20 to 50 % of a function's body → the rest, cut where a statement starts."""
    lines, body = function.lines, function.doc_lines[1]
    starts = {
        node.lineno - 1
        for node in ast.walk(ast.parse(function.code))
        if isinstance(node, ast.stmt) and lines[node.lineno - 1][: node.col_offset].isspace()
    }
    least, most = body + 0.2 * (len(lines) - body), body + 0.5 * (len(lines) - body)
    cuts = sorted(start for start in starts if max(least, body + 1) <= start <= most)
    if not cuts:
        return None
    cut = cuts[int(draw("cut", function.path) * len(cuts))]
    rest = "\n".join(lines[cut:])
    return ("\n".join(lines[:cut]).rstrip(), rest) if len(rest.strip()) >= 25 else None


def function_name(function: Function) -> tuple[str, str] | None:
    """A function with its name masked → the name."""
    name, code = function.name, function.undocumented()
    if len(name.strip("_")) < 4 or name.endswith("__") or MASK in function.code or len(function.code) > 1_600:
        return None
    return re.sub(rf"\b{name}\b", MASK, code), name


def unit_test_rows(
    tests: Iterable[Path], library: Sequence[Function], left_out: Counter[str]
) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Yields rows of unit tests and of doctests, each with the paths of the functions it shows."""
    for test in from_test_suite(tests, library, left_out):
        human = f"Write the unittest method `{test.name}` for `{test.target}`.\n\n{block(test.code)}"
        if test.imports:
            human += "\n\nThe test file starts with:\n\n" + block("\n".join(test.imports))
        yield chat("unit_test", test.target, human, test.test, f":{test.name}"), test.shown
    for function, examples in from_docstrings(library):
        summary = function.doc.split(">>>")[0].split("\n\n")[0].strip()
        human = f"Write doctest examples for this {kind(function)}.\n\n{block(function.undocumented())}"
        if summary:
            human += f"\n\nIt is described as: {summary}"
        yield chat("unit_test", function.path, human, examples, ":doctest"), (function.path,)


def select(task: str, rows: list[Row], left_out: Counter[str]) -> list[Row]:
    """Returns at most CAPS[task] rows, drawn by hash, in the order of their ids."""
    kept: dict[str, Row] = {}
    taken: Counter[tuple[str, str]] = Counter()  # rows of an owner, and of an answer
    for row in sorted(rows, key=lambda row: (draw("select", row["id"]), row["id"])):
        owner = ("owner", row["source"].rpartition(".")[0])
        answer = ("answer", row["source"] if task == "unit_test" else row["chat_rounds"][-1]["content"])
        if characters(row) > MAX_CHARACTERS:
            left_out["row too long"] += 1
        elif row["id"] in kept or taken[answer] == PER_ANSWER.get(task, 1):
            left_out["same answer or subject as another row"] += 1
        elif taken[owner] == PER_OWNER or len(kept) == CAPS[task]:
            left_out["not drawn"] += 1
        else:
            kept[row["id"]] = row
            taken.update((owner, answer))
    return [kept[name] for name in sorted(kept)]


def held_out(rows: list[Row]) -> Row:
    """Returns the row to show before and after training: short, from a module people know."""

    def order(row: Row) -> tuple[bool, bool, bool, float]:
        # characters of an answer that shows something
        least = 6 if row["data_name"] == "function_name" else 40
        short = characters(row) <= 900 and least <= len(row["chat_rounds"][-1]["content"]) <= 400
        public = "._" not in "." + row["source"] and not row["id"].endswith(":doctest")
        return not short, not public, row["source"].split(".")[0] not in FAMILIAR, draw("shown", row["id"])

    return min(rows, key=order)
