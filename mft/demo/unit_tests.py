"""The demo's unit-test task: tests of Lib/test beside the code they exercise, and doctests.

Only test methods that stand alone are taken: every name in them is a builtin, an import from the standard
library or their own, and `self` is used for what unittest.TestCase has. So prompt (code and imports) and
answer run together.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import sys
import unittest
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.demo.source import Definition, Function, definitions, parse, read

MAX_PROMPT_CODE = 1_600  # characters of the code under test that the prompt shows
MAX_DOCTEST = 1_500
TEST_CASE = frozenset(dir(unittest.TestCase))
BUILTINS = frozenset(dir(builtins))

Imports = dict[str, tuple[str, str]]
"""Name in a test module → (the dotted name it stands for, the import statement)."""


@dataclass(frozen=True)
class UnitTest:
    """A test method, what it exercises and what must be imported for it."""

    target: str
    """Dotted path of the function or class under test."""

    code: str
    """Source of the target; of a class, the methods that the test names."""

    shown: tuple[str, ...]
    """Paths of the functions whose source is in `code`."""

    name: str
    """The method's name."""

    imports: tuple[str, ...]
    """Import statements, without `import unittest`."""

    test: str
    """Source of the method."""


class Targets:
    """The library's functions and classes by dotted name, also where a package exports them."""

    def __init__(self, functions: Iterable[Function]) -> None:
        self.members: dict[str, list[Function]] = {}  # path of a function or class → it, or its methods
        self.exports: dict[tuple[str, str], set[str]] = {}  # (top package, name) → paths
        for function in functions:
            if "." not in function.owner:
                path = f"{function.module}.{function.owner or function.name}"
                self.members.setdefault(path, []).append(function)
                self.exports.setdefault((path.split(".")[0], path.rsplit(".", 1)[1]), set()).add(path)

    def find(self, dotted: str) -> str | None:
        """Returns the longest beginning of a dotted name that is a function or class: "asyncio.gather.x" →
        "asyncio.tasks.gather"."""
        while "." in dotted:
            if dotted in self.members:
                return dotted
            package, _, name = dotted.rpartition(".")
            if len(exported := self.exports.get((package, name), set())) == 1:
                return next(iter(exported))
            dotted = package
        return None

    def source(self, path: str, used: set[str]) -> tuple[str, tuple[str, ...]] | None:
        """Returns the code of a function, or the `used` methods of a class; None where too long or empty."""
        members = self.members[path]
        code = members[0].code
        if members[0].owner:
            if not used.intersection(member.name for member in members):
                return None
            members = [member for member in members if member.name in used or member.name == "__init__"]
            methods = [
                "\n".join("    " + line if line else "" for line in member.lines) for member in members
            ]
            code = members[0].owner_head + "\n" + "\n\n".join(methods)
        return None if len(code) > MAX_PROMPT_CODE else (code, tuple(member.path for member in members))


def from_test_suite(
    tests: Iterable[Path], functions: Iterable[Function], left_out: Counter[str]
) -> list[UnitTest]:
    """Returns the test methods of files that stand alone and exercise one of `functions`, each text once."""
    targets = Targets(functions)
    kept: dict[str, UnitTest] = {}
    for path in tests:
        if (parsed := parse(path)) is None:
            left_out["test file does not parse"] += 1
            continue
        lines, tree = parsed
        imports = _imports(tree)
        for owners, node in definitions(tree.body):
            if len(owners) == 1 and node.name.startswith("test"):
                test = _standalone(lines, node, imports, targets)
                if test is None:
                    left_out["test that does not stand alone"] += 1
                else:
                    kept.setdefault(test.test, test)
    return list(kept.values())


def _standalone(lines: list[str], node: Definition, imports: Imports, targets: Targets) -> UnitTest | None:
    """Returns a test method; None where it needs more than imports, or its target cannot be shown."""
    nodes = list(ast.walk(node))
    names = [item.id for item in nodes if isinstance(item, ast.Name)]
    attributes = [item for item in nodes if isinstance(item, ast.Attribute)]
    of_self = [
        item.attr for item in attributes if isinstance(item.value, ast.Name) and item.value.id == "self"
    ]
    if names.count("self") > len(of_self) or not TEST_CASE.issuperset(
        of_self
    ):  # self handed on, or more than TestCase
        return None
    stored = [item.id for item in nodes if isinstance(item, ast.Name) and not isinstance(item.ctx, ast.Load)]
    given = [item.arg for item in nodes if isinstance(item, ast.arg)]
    # Functions, classes, `except … as name` and imports inside the test have a `name`; of `import a.b` it
    # binds a.
    named: list[Any] = [item for item in nodes if getattr(item, "name", None)]
    bound = [(getattr(item, "asname", None) or item.name).split(".")[0] for item in named]
    free = set(names).difference(stored, given, bound, BUILTINS)
    if not all(
        name in imports and imports[name][0].split(".")[0] in sys.stdlib_module_names for name in free
    ):
        return None
    method = read(lines, node)
    if isinstance(method, str):
        return None
    referred: Counter[str] = Counter()
    for dotted in [*names, *map(_dotted, attributes)]:
        head, _, rest = dotted.partition(".")
        if head in free and (target := targets.find(f"{imports[head][0]}.{rest}".rstrip("."))):
            referred[target] += 1
    title = node.name.lower().replace("_", "")
    used = {item.attr for item in attributes}
    # What the test is named after comes first, then what it names most often.
    for target in sorted(
        referred, key=lambda path: (path.rsplit(".", 1)[1].lower() not in title, -referred[path], path)
    ):
        if (shown := targets.source(target, used)) is not None:
            needed = sorted({imports[name][1] for name in free} - {"import unittest"})
            return UnitTest(target, *shown, node.name, tuple(needed), method.code)
    return None


def _imports(tree: ast.Module) -> Imports:
    imports: Imports = {}
    for node in tree.body:
        match node:
            case ast.Import():
                for item in node.names:
                    name = item.asname or item.name.split(".")[0]
                    imports[name] = (item.name if item.asname else name, ast.unparse(ast.Import([item])))
            case ast.ImportFrom(module=str(module), level=0):
                for item in node.names:
                    statement = ast.unparse(ast.ImportFrom(module, [item], 0))
                    imports[item.asname or item.name] = (f"{module}.{item.name}", statement)
    return imports


def _dotted(node: ast.expr) -> str:
    """ "os.path.join" for that expression, "" for any that is not names and dots."""
    if isinstance(node, ast.Attribute) and (head := _dotted(node.value)):
        return f"{head}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def from_docstrings(functions: Iterable[Function]) -> Iterator[tuple[Function, str]]:
    """Yields functions whose docstring has at least two interactive examples, with these examples as text."""
    for function in functions:
        try:
            examples = doctest.DocTestParser().get_examples(function.doc)
        except ValueError:  # an example that doctest itself refuses
            continue
        text = "\n".join(_as_written(example) for example in examples)
        if len(examples) >= 2 and len(text) <= MAX_DOCTEST:
            yield function, text


def _as_written(example: doctest.Example) -> str:
    source = example.source.rstrip("\n").replace("\n", "\n... ")
    lines = [f">>> {source}", *([example.want.rstrip("\n")] if example.want else [])]
    return "\n".join(line.rstrip() for line in "\n".join(lines).split("\n"))
