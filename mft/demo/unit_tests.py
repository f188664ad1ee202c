"""The demo's unit-test task: tests out of Lib/test beside the code they exercise, and doctests beside their function.

Only test methods that stand alone are taken: every name in them is a builtin, an import from the standard library or
their own, and `self` is used for what unittest.TestCase has. So prompt (code and imports) and answer make a whole.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import sys
import unittest
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mft.demo.source import Definition, Function, definitions, parse, read

MAX_PROMPT_CODE = 1_600  # characters of the code under test that the prompt shows
MAX_DOCTEST = 1_500
TEST_CASE = frozenset(dir(unittest.TestCase))
BUILTINS = frozenset(dir(builtins))


@dataclass(frozen=True)
class UnitTest:
    """A test, what it exercises and what must be imported for it."""

    target: str  # dotted path of the function or class under test
    code: str  # source of the target, or of the methods of it that the test names
    shown: tuple[str, ...]  # paths of the functions whose source is in `code`
    name: str
    imports: tuple[str, ...]  # import statements, without `import unittest`
    test: str


class Targets:
    """Finds the function or class behind a dotted name, also where a package exports it from one of its modules."""

    def __init__(self, functions: Iterable[Function]) -> None:
        self.members: dict[str, list[Function]] = {}  # path of a function or class → it, or its methods
        self.exports: dict[tuple[str, str], set[str]] = {}  # (top package, name) → paths
        for function in functions:
            if "." in function.owner:
                continue
            path = f"{function.module}.{function.owner or function.name}"
            self.members.setdefault(path, []).append(function)
            self.exports.setdefault((path.split(".")[0], path.rsplit(".", 1)[1]), set()).add(path)

    def resolve(self, dotted: str) -> str | None:
        """ "asyncio.gather" → "asyncio.tasks.gather"; None when the library has no Python source for it."""
        if dotted in self.members:
            return dotted
        package, _, name = dotted.rpartition(".")
        found = self.exports.get((package, name), set())
        return next(iter(found)) if len(found) == 1 else None

    def source(self, path: str, used: set[str]) -> tuple[str, tuple[str, ...]] | None:
        """Code of a function, or of a class the methods that are `used`; None when too long or when nothing is left."""
        members = self.members[path]
        if members[0].owner:
            members = [method for method in members if method.name in used or method.name == "__init__"]
            if not any(method.name in used for method in members):
                return None
            parts = ["\n".join("    " + line if line else "" for line in method.lines) for method in members]
            code = members[0].owner_head + "\n" + "\n\n".join(parts)
        else:
            code = members[0].code
        return None if len(code) > MAX_PROMPT_CODE else (code, tuple(member.path for member in members))


def from_test_suite(tests: Iterable[Path], functions: Iterable[Function], left_out: Counter[str]) -> list[UnitTest]:
    """The test methods of the files `tests` that stand alone and exercise one of `functions`, each text once."""
    targets = Targets(functions)
    found: list[UnitTest] = []
    seen: set[str] = set()
    for path in tests:
        parsed = parse(path)
        if parsed is None:
            left_out["test file does not parse"] += 1
            continue
        text, tree = parsed
        lines, imported = text.split("\n"), imports(tree)
        for owners, node in definitions(tree.body):
            if len(owners) != 1 or not node.name.startswith("test"):
                continue
            test = standalone(lines, owners, node, imported, targets)
            if test is None:
                left_out["test that does not stand alone"] += 1
            elif test.test not in seen:
                seen.add(test.test)
                found.append(test)
    return found


def standalone(
    lines: list[str],
    owners: tuple[ast.ClassDef, ...],
    node: Definition,
    imported: dict[str, Import],
    targets: Targets,
) -> UnitTest | None:
    """The test method `node`, or None when it needs more than imports or has no target whose source can be shown."""
    use = names(node)
    free = use.loaded - use.bound - BUILTINS
    if not use.self_attributes <= TEST_CASE or use.self_alone or not free <= imported.keys():
        return None
    if not all(imported[name].module.split(".")[0] in sys.stdlib_module_names for name in free):
        return None
    method, _ = read(lines, node, "", owners)
    if method is None:
        return None
    referred: Counter[str] = Counter()
    for dotted in use.dotted:
        head, _, rest = dotted.partition(".")
        if head in free and (target := imported[head].target(rest, targets)) is not None:
            referred[target] += 1
    words = node.name.lower().replace("_", "")
    for target in sorted(
        referred, key=lambda path: (path.rsplit(".", 1)[1].lower() not in words, -referred[path], path)
    ):
        shown = targets.source(target, use.attributes)
        if shown is not None:
            needed = sorted({imported[name].statement for name in free} - {"import unittest"})
            return UnitTest(target, shown[0], shown[1], node.name, tuple(needed), method.code)
    return None


@dataclass(frozen=True)
class Import:
    """What a name of a test module stands for: a module, or a name in a module."""

    module: str
    name: str
    statement: str

    def target(self, rest: str, targets: Targets) -> str | None:
        """The function or class that `rest`, the attributes after the imported name, leads to."""
        dotted = [part for part in (self.module, self.name, rest) if part]
        parts = ".".join(dotted).split(".")
        for length in range(len(parts), 1, -1):  # the longest prefix that is a function or class
            if (found := targets.resolve(".".join(parts[:length]))) is not None:
                return found
        return None


def imports(tree: ast.Module) -> dict[str, Import]:
    """Names that the imports at the top of a module bind."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for item in node.names:
                bound = item.asname or item.name.split(".")[0]
                module = item.name if item.asname else bound
                found[bound] = Import(module, "", ast.unparse(ast.Import([item])))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                statement = ast.unparse(ast.ImportFrom(node.module, [item], 0))
                found[item.asname or item.name] = Import(node.module, item.name, statement)
    return found


@dataclass
class Names:
    """How a test method uses names."""

    loaded: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)
    dotted: list[str] = field(default_factory=list)
    attributes: set[str] = field(default_factory=set)
    self_attributes: set[str] = field(default_factory=set)
    self_alone: bool = False


def names(node: Definition) -> Names:
    """Reads the names of a function; what is bound anywhere in it counts as its own."""
    use = Names()
    selves = 0
    for item in ast.walk(node):
        match item:
            case ast.Name(id=name, ctx=ast.Load()):
                use.loaded.add(name)
                use.dotted.append(name)
                selves += name == "self"
            case ast.Name(id=name):
                use.bound.add(name)
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                use.bound.add(name)
            case ast.alias(name=name, asname=asname):
                use.bound.add(asname or name.split(".")[0])
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                use.bound.add(name)
            case ast.Attribute(value=value, attr=attribute):
                use.attributes.add(attribute)
                if isinstance(value, ast.Name) and value.id == "self":
                    use.self_attributes.add(attribute)
                    selves -= isinstance(value.ctx, ast.Load)
                elif dotted := dotted_name(item):
                    use.dotted.append(dotted)
    use.self_alone = selves > 0
    return use


def dotted_name(node: ast.expr) -> str:
    """ "os.path.join" for that expression, "" for any that is not names and dots."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted_name(node.value)):
        return f"{head}.{node.attr}"
    return ""


def from_docstrings(functions: Iterable[Function]) -> Iterator[tuple[Function, str]]:
    """Functions whose docstring has at least two interactive examples, with these examples as text."""
    parser = doctest.DocTestParser()
    for function in functions:
        try:
            examples = parser.get_examples(function.doc)
        except ValueError:  # an example that doctest itself refuses
            continue
        text = "\n".join(written(example) for example in examples)
        if len(examples) >= 2 and len(text) <= MAX_DOCTEST:
            yield function, text


def written(example: doctest.Example) -> str:
    """An example as it stands in a docstring."""
    first, *more = example.source.rstrip("\n").split("\n")
    lines = [f">>> {first}", *(f"... {line}".rstrip() for line in more)]
    return "\n".join([*lines, *([example.want.rstrip("\n")] if example.want else [])])
