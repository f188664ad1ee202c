"""Five code tasks out of the standard library's source, as chatML rows: deterministic for one interpreter.

A function serves one task only, so that no answer of one task is read in another and validation losses stay honest.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mft.demo import unit_tests
from mft.demo.source import Function, functions

# Rows a task keeps at most. Unequal, as real tasks are; together about 1 M SmolLM2 tokens with Python 3.11.
CAPS = {"completion": 1_200, "docstring": 700, "function_body": 1_250, "function_name": 500, "unit_test": 600}
PER_OWNER = 20  # rows a task takes from one class or from a module's functions, so that none becomes the subject
PER_TARGET = 3  # unit tests of one function or class
PER_NAME = 2  # functions of one name in function_name: the library has dozens of `close`
SEED = "mft-demo-1"
MAX_CHARACTERS = 5_000  # of a row's messages: about 1,700 SmolLM2 tokens at most
MASK = "____"

# Subjects that most readers know: the examples at the end of the demo come from these where possible.
FAMILIAR = (
    *("bisect", "calendar", "collections", "contextlib", "copy", "csv", "datetime", "fnmatch", "fractions", "glob"),
    *("heapq", "html", "ipaddress", "json", "os", "pathlib", "posixpath", "pprint", "queue", "random", "shlex"),
    *("shutil", "statistics", "string", "tempfile", "textwrap", "timeit", "urllib.parse", "uuid", "zipfile"),
)
# Characters (all messages, answer) within which a row is short enough to be shown on a screen.
SHOWN = {
    "completion": (900, (60, 400)),
    "docstring": (900, (40, 220)),
    "function_body": (700, (60, 400)),
    "function_name": (700, (6, 30)),
    "unit_test": (1_100, (80, 450)),
}

Row = dict[str, Any]


def build(
    files: Sequence[Path], tests: Sequence[Path], root: Path
) -> tuple[dict[str, list[Row]], list[Row], dict[str, int]]:
    """Makes the tasks from library source `files` and `tests` under `root`.

    Returns the rows of each task in the order of their ids; one held-out row per task, which is in no task; and how
    many functions and tests were left out, by reason.
    """
    left_out: Counter[str] = Counter()
    found = functions(files, root, left_out)
    candidates: dict[str, list[Row]] = {task: [] for task in CAPS}
    taken: set[str] = set()
    for row, shown in unit_test_rows(tests, found, left_out):
        candidates["unit_test"].append(row)
        taken.update(shown)
    rows = {"unit_test": select("unit_test", candidates["unit_test"], left_out)}
    for function in found:
        if function.path not in taken and (dealt := function_row(function, left_out)) is not None:
            candidates[dealt["data_name"]].append(dealt)
    rows |= {task: select(task, candidates[task], left_out) for task in CAPS if task != "unit_test"}
    examples = [held_out(task, rows[task]) for task in sorted(rows)]
    for example in filter(None, examples):
        task = example["data_name"]
        rows[task] = [row for row in rows[task] if row["source"] != example["source"]]
    return {task: rows[task] for task in sorted(rows)}, [row for row in examples if row], dict(sorted(left_out.items()))


def share(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` and the seed alone."""
    text = "\n".join([SEED, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def pick(options: Sequence[str], *parts: object) -> str:
    return options[int(share(*parts) * len(options))]


def chat(task: str, function_path: str, human: str, bot: str, system: str = "", name: str = "") -> Row:
    rounds = [{"role": "system", "content": system}] if system else []
    rounds += [{"role": "human", "content": human}, {"role": "bot", "content": bot}]
    suffix = f":{name}" if name else ""
    return {"id": f"{task}/{function_path}{suffix}", "data_name": task, "source": function_path, "chat_rounds": rounds}


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def characters(row: Row) -> int:
    return sum(len(message["content"]) for message in row["chat_rounds"])


def function_row(function: Function, left_out: Counter[str]) -> Row | None:
    """Deals a function to one of four tasks and makes its row; None where it does not fit that task."""
    draw = share("task", function.path)
    if function.doc:
        make = function_body if draw < 0.42 else docstring if draw < 0.72 else completion
    else:
        make = completion if draw < 0.45 else function_name
    row = make(function)
    if row is None:
        left_out[f"unfit for {make.__name__}"] += 1
    return row


def kind(function: Function) -> str:
    return f"method of `{function.owner}`" if function.owner else f"function from `{function.module}`"


def function_body(function: Function) -> Row | None:
    """Signature and docstring → body."""
    if not 20 <= len(function.doc) <= 1_500 or function.doc.startswith("Internal"):
        return None
    human = pick(
        (
            f"Implement this {kind(function)}. Answer with the body only.\n\n{block(function.head())}",
            f"Please write the body of `{function.name}` so that it does what the docstring says.\n\n"
            f"{block(function.head())}",
            f"{block(function.head())}\n\nComplete this {kind(function)}. I only need the code below the docstring.",
        ),
        "wording",
        function.path,
    )
    return chat("function_body", function.path, human, function.body())


def docstring(function: Function) -> Row | None:
    """Code → the text of its docstring."""
    if not 25 <= len(function.doc) <= 700 or not function.doc[0].isupper() or function.doc.startswith("Internal"):
        return None
    code = block(function.undocumented())
    human = pick(
        (
            f"Write the docstring of this {kind(function)}.\n\n{code}",
            f"What would be a good docstring for `{function.name}`?\n\n{code}",
            f"{code}\n\nDescribe what this {kind(function)} does, as a docstring.",
        ),
        "wording",
        function.path,
    )
    system = "You document Python code. Answer with the text of the docstring, without quotes."
    return chat("docstring", function.path, human, function.doc, system)


def completion(function: Function) -> Row | None:
    """The first part of a function → the rest, cut where a statement starts."""
    lines = function.lines
    starts = [
        node.lineno - 1
        for node in ast.walk(ast.parse(function.code))
        if isinstance(node, ast.stmt) and lines[node.lineno - 1][: node.col_offset].isspace()
    ]
    body = function.doc_lines[1]
    least, most = body + 0.2 * (len(lines) - body), body + 0.5 * (len(lines) - body)
    cuts = sorted({start for start in starts if least <= start <= most and start > body})
    if not cuts:
        return None
    cut = cuts[int(share("cut", function.path) * len(cuts))]
    first, rest = "\n".join(lines[:cut]).rstrip(), "\n".join(lines[cut:])
    if len(rest.strip()) < 25:
        return None
    human = pick(
        (
            f"Continue this {kind(function)} where it stops.\n\n{block(first)}",
            f"The code below breaks off in the middle of `{function.name}`. Write the rest of it.\n\n{block(first)}",
            f"{block(first)}\n\nHow does `{function.name}` go on? Give me the remaining lines only.",
        ),
        "wording",
        function.path,
    )
    return chat("completion", function.path, human, rest)


def function_name(function: Function) -> Row | None:
    """A function with its name masked → the name."""
    name = function.name
    if len(name.strip("_")) < 4 or name.endswith("__") or MASK in function.code or len(function.code) > 1_600:
        return None
    code = block(re.sub(rf"\b{name}\b", MASK, function.undocumented()))
    what = "method" if function.owner else "function"
    human = pick(
        (
            f"What is a good name for this {what}? Answer with the name only.\n\n{code}",
            f"Name this {what} (`{MASK}` stands for the name).\n\n{code}",
            f"{code}\n\nWhich name belongs in place of `{MASK}`?",
        ),
        "wording",
        function.path,
    )
    return chat("function_name", function.path, human, name)


def unit_test_rows(
    tests: Iterable[Path], found: list[Function], left_out: Counter[str]
) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Rows of tests out of `tests` and of doctests, each with the paths of the functions it shows."""
    system = "You write unit tests for Python code. Answer with the test only."
    for test in unit_tests.from_test_suite(tests, found, left_out):
        human = f"Write the unittest method `{test.name}` for `{test.target}`.\n\n{block(test.code)}"
        if test.imports:
            human += "\n\nThe test file starts with:\n\n" + block("\n".join(test.imports))
        yield chat("unit_test", test.target, human, test.test, system, test.name), test.shown
    for function, examples in unit_tests.from_docstrings(found):
        summary = function.doc.split(">>>")[0].split("\n\n")[0].strip()
        human = f"Write doctest examples for this {kind(function)}.\n\n{block(function.undocumented())}"
        if summary:
            human += f"\n\nIt is described as: {summary}"
        yield chat("unit_test", function.path, human, examples, system, "doctest"), (function.path,)


def select(task: str, rows: list[Row], left_out: Counter[str]) -> list[Row]:
    """At most CAPS[task] rows, drawn by hash, no answer twice (but for names), in the order of their ids."""
    kept: list[Row] = []
    owners: Counter[str] = Counter()
    groups: Counter[str] = Counter()
    ids: set[str] = set()
    for row in sorted(rows, key=lambda row: (share("select", row["id"]), row["id"])):
        answer = row["chat_rounds"][-1]["content"]
        owner = row["source"].rpartition(".")[0]
        group = row["source"] if task == "unit_test" else answer
        most = {"unit_test": PER_TARGET, "function_name": PER_NAME}.get(task, 1)
        if characters(row) > MAX_CHARACTERS:
            left_out["row too long"] += 1
        elif row["id"] in ids or groups[group] == most:
            left_out["same answer or subject as another row"] += 1
        elif owners[owner] == PER_OWNER or len(kept) == CAPS[task]:
            left_out["not drawn"] += 1
        else:
            kept.append(row)
            ids.add(row["id"])
            owners[owner] += 1
            groups[group] += 1
    return sorted(kept, key=lambda row: row["id"])


def held_out(task: str, rows: list[Row]) -> Row | None:
    """The row to show before and after training: short, from a module people know; None when there is none at all."""

    def order(row: Row) -> tuple[bool, bool, bool, float]:
        most, (low, high) = SHOWN[task]
        answer = row["chat_rounds"][-1]["content"]
        fits = characters(row) <= most and low <= len(answer) <= high
        public = "._" not in "." + row["source"] and not row["id"].endswith(":doctest")
        familiar = any(row["source"].startswith(module + ".") for module in FAMILIAR)
        return not fits, not public, not familiar, share("shown", row["id"])

    return min(rows, key=order, default=None)
