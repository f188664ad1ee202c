"""Five code tasks out of the standard library's source, as chatML rows: deterministic for one interpreter.

A function serves one task only, so that no answer of one task is read in another and validation losses stay
honest: functions that a unit test shows come first, chance deals the others. A unit test is taken where it
stands alone, that is where it needs the standard library and unittest.TestCase and nothing else.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import sys
import unittest
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from mft.demo.source import Function, definitions, first_line, functions, parse, read

CAPS = {"completion": 1_200, "docstring": 700, "function_body": 1_250, "function_name": 500, "unit_test": 600}
"""Rows of a task at most. Unequal, as real tasks are; together 0.9 M SmolLM2 tokens with Python 3.11."""

MAX_CHARACTERS = 5_000  # of a row's messages: about 1,700 SmolLM2 tokens at most
MASK = "____"

FAMILIAR = re.compile(
    r"(bisect|calendar|csv|datetime|fractions|glob|heapq|json|pathlib|random|shlex|textwrap)(\.[a-zA-Z]\w*)+"
)
"""Public subjects that most readers know: the held-out rows come from these where possible."""

Row = dict[str, Any]
"""A conversation as conf/format/chat.yaml reads it, with its id, task and the dotted path of its subject."""

RowOf = tuple[Function, Row]
"""A function that no other task may use, and the row of a unit test that shows it."""

Built = tuple[dict[str, list[Row]], list[Row], dict[str, int]]


def build(files: Sequence[Path], tests: Sequence[Path], root: Path) -> Built:
    """Makes the tasks from library source `files` and `tests` under `root`.

    Returns the rows of each task in the order of their ids; one held-out row per task, which is in no task;
    and how many functions and tests were left out, by reason.
    """
    left_out: Counter[str] = Counter()
    library = functions(files, root, left_out)
    candidates: dict[str, list[Row]] = {task: [] for task in CAPS}
    tested: set[str] = set()
    for function, row in (*unit_tests(tests, library, left_out), *doctests(library)):
        candidates["unit_test"].append(row)
        tested.add(function.path)
    for function in library:
        if function.path not in tested:
            task, prompt, answer = deal(function)
            if answer:
                candidates[task].append(chat(task, function, prompt, answer))
            else:
                left_out[f"unfit for {task}"] += 1
    rows = {task: select(task, of_task, left_out) for task, of_task in candidates.items()}
    examples = [min(of_task, key=showing_order) for of_task in rows.values() if of_task]
    sources = {row["source"] for row in examples}
    rows = {task: [row for row in of_task if row["source"] not in sources] for task, of_task in rows.items()}
    return rows, examples, dict(sorted((+left_out).items()))


def chat(task: str, function: Function, prompt: str, answer: str, suffix: str = "") -> Row:
    """Returns a row; suffix: tells the rows of one function apart."""
    return {
        "id": f"{task}/{function.path}{suffix}",
        "data_name": task,
        "source": function.path,
        "chat_rounds": [{"role": "human", "content": prompt}, {"role": "bot", "content": answer}],
    }


def block(code: str) -> str:
    """Returns code between fences."""
    return f"\n\n```python\n{code}\n```"


def characters(row: Row) -> int:
    """Returns the length of all messages."""
    return sum(len(message["content"]) for message in row["chat_rounds"])


def kind(function: Function) -> str:
    """Returns what a prompt calls a function, without its name."""
    return f"method of `{function.owner}`" if function.owner else f"function from `{function.module}`"


def deal(function: Function) -> tuple[str, str, str]:
    """Returns the task of a function, its prompt and its answer: "" where it does not fit the task."""
    chance, doc, what = Random(function.path).random(), function.doc, kind(function)
    if chance < (0.28 if doc else 0.45):
        begun, rest = split(function)
        return "completion", f"Continue this {what} where it stops.{block(begun)}", rest
    if not doc:
        name, code = function.name, function.undocumented
        fits = len(name.strip("_")) >= 4 and not name.endswith("__") and len(code) <= 1_600
        masked = block(re.sub(rf"\b{name}\b", MASK, code))
        prompt = f"Which name does this {what} have in place of `{MASK}`? Answer with the name only.{masked}"
        return "function_name", prompt, name if fits else ""
    if chance < 0.58:
        prompt = f"Write the docstring of this {what}. Answer with its text, without quotes."
        return "docstring", prompt + block(function.undocumented), doc if 25 <= len(doc) <= 700 else ""
    prompt = f"Implement this {what}. Answer with the body only.{block(function.head)}"
    return "function_body", prompt, function.body if 20 <= len(doc) <= 1_500 else ""


def split(function: Function) -> tuple[str, str]:
    """Returns a function up to the first 20 to 50 % of its body, and the rest, where a statement starts."""
    lines = function.body.split("\n")
    nodes = [node for node in ast.walk(ast.parse(f"if 1:\n{function.body}")) if isinstance(node, ast.stmt)]
    starts = {at - 2 for node in nodes if lines[(at := first_line(node)) - 2][: node.col_offset].isspace()}
    cuts = [start for start in starts if max(1, 0.2 * len(lines)) <= start <= 0.5 * len(lines)]
    cut = Random(function.path).choice(sorted(cuts) or [len(lines)])
    return "\n".join([function.head, *lines[:cut]]).rstrip(), "\n".join(lines[cut:])


def unit_tests(tests: Sequence[Path], library: Sequence[Function], left_out: Counter[str]) -> Iterator[RowOf]:
    """Yields the tests of Lib/test that stand alone, each with the function that it is named after."""
    submodules = {f.module for f in library if "." in f.module}  # not there after `import unittest`
    for path in tests:
        # test/test_json/test_dump.py is of json, test/test_textwrap.py of textwrap.
        package = path.as_posix().rpartition("/test/test_")[2].removesuffix(".py").partition("/")[0]
        members = [function for function in library if f"{function.module}.".startswith(f"{package}.")]
        lines, statements = parse(path, left_out)
        imports = [item for node in statements if isinstance(node, ast.Import) for item in node.names]
        modules = {item.name for item in imports if not item.asname} & sys.stdlib_module_names
        for owner, node in definitions(statements):
            test = read(lines, node, "", owner)
            absent = not isinstance(test, str) and any(map(test.body.count, submodules))
            if isinstance(test, str) or absent or not stands_alone(test, modules):
                left_out["test that does not stand alone"] += 1
                continue
            # Only modules are imported, so that a function is called by a dotted name; a class is named, too.
            named = [f for f in members if f.name.lower() in test.name.lower() and f".{f.name}(" in test.body]
            named = [f for f in named if f.owner.split(".")[-1] in test.body]
            left_out["test that is named after no function"] += not named
            for function in sorted(named, key=lambda candidate: len(candidate.name))[-1:]:
                what, code = kind(function), block(function.code)
                prompt = f"Write the unittest method `{test.name}` for this {what}.{code}"
                yield function, chat("unit_test", function, prompt, test.code, f":{test.name}")


def stands_alone(test: Function, modules: set[str]) -> bool:
    """Whether it is a test method that needs modules, builtins and unittest.TestCase, and nothing else."""
    attributes = set(re.findall(r"\bself\b\.?(\w*)", test.body))  # "" where self itself is handed on
    names = global_names(symtable.symtable(test.code, "test", "exec"))
    alone = attributes.issubset(dir(unittest.TestCase)) and names <= modules.union(dir(builtins))
    return alone and bool(test.owner) and test.head.startswith("def test")  # not async def


def global_names(scope: symtable.SymbolTable) -> set[str]:
    """Returns the names that code and the functions in it read from their module, or import."""
    symbols = scope.get_symbols()
    names = {s.get_name() for s in symbols if (s.is_global() and s.is_referenced()) or s.is_imported()}
    return names.union(*map(global_names, scope.get_children()))


def doctests(library: Sequence[Function]) -> Iterator[RowOf]:
    """Yields functions whose docstring has at least two interactive examples, which are the answer."""
    for function in library:
        # An example ends with the blank line after what it prints.
        examples = "\n".join(re.findall(r"^>>> .+(?:\n.+)*", function.doc, re.MULTILINE))
        if examples.count(">>> ") >= 2 and len(examples) <= 1_500:
            prompt = f"Write doctest examples for this {kind(function)}.{block(function.undocumented)}"
            yield function, chat("unit_test", function, prompt, examples, ":doctest")


def select(task: str, rows: Iterable[Row], left_out: Counter[str]) -> list[Row]:
    """Returns at most CAPS[task] rows, drawn by hash, each answer once, in the order of their ids."""
    drawn = sorted(rows, key=lambda row: Random(row["id"]).random())  # the same in every process
    by_answer = {row["chat_rounds"][-1]["content"]: row for row in drawn if characters(row) <= MAX_CHARACTERS}
    kept = {row["id"]: row for row in list(by_answer.values())[: CAPS[task]]}
    left_out["too long for a row, the answer of another row, or not drawn"] += len(drawn) - len(kept)
    return [kept[name] for name in sorted(kept)]


def showing_order(row: Row) -> tuple[bool, bool, bool, str]:
    """What is shown before and after training is the first row: short, and of something people know."""
    least = 6 if row["data_name"] == "function_name" else 40  # characters of an answer that shows something
    short = characters(row) <= 900 and least <= len(row["chat_rounds"][-1]["content"]) <= 400
    return not short, not FAMILIAR.fullmatch(row["source"]), row["id"].endswith(":doctest"), row["id"]
