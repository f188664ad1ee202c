"""The standard library's source as a list of functions, from which the demo's tasks are cut."""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = re.compile(
    r"(site|dist)-packages|tests?|idle.*|lib2to3|turtledemo|encodings|_vendor|config-.*|_sysconfig.*"
)
"""Not the library itself (installed packages, tests, an IDE, vendored or generated files), or tables only."""

PLAIN = re.compile(r"[ -~\n]{,4200}")
"""Source that a function may have: no tabs, ASCII only, about 1,400 SmolLM2 tokens at most."""

MIN_BODY = 80  # characters

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One top-level function or method, dedented."""

    module: str
    """Its dotted name."""

    owner: str
    """The dotted classes around it, "" for a function of the module."""

    name: str
    """Its own name, without module and classes."""

    code: str
    """The whole source, without blank lines at its end."""

    head: str
    """Signature and docstring."""

    body: str
    """What follows the head, indented as there, without blank lines around."""

    undocumented: str
    """The whole source without the docstring."""

    doc: str
    """The text of the docstring, "" where it has none."""

    @property
    def path(self) -> str:
        """The dotted name a person would use: "textwrap.TextWrapper.fill"."""
        return ".".join(filter(None, (self.module, self.owner, self.name)))


def stdlib_root() -> Path:
    """Returns the folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files(root: Path) -> list[Path]:
    """Returns the source files of the library, sorted; tests are not among them (see `test_files`)."""
    files = sorted(root.rglob("*.py"))
    return [file for file in files if not any(map(SKIPPED.fullmatch, file.relative_to(root).parts))]


def test_files(root: Path) -> list[Path]:
    """Returns `test_*.py` of Lib/test, sorted; none where a Python comes without it."""
    return sorted((root / "test").rglob("test_*.py"))


def parse(path: Path, left_out: Counter[str]) -> tuple[list[str], list[ast.stmt]]:
    """Returns lines and statements of a file; none where this Python cannot read its syntax or encoding."""
    try:
        text = path.read_text(encoding="utf-8")
        return text.split("\n"), ast.parse(text).body
    except (SyntaxError, ValueError):
        left_out["file does not parse"] += 1
        return [], []


def functions(files: Iterable[Path], root: Path, left_out: Counter[str]) -> list[Function]:
    """Returns the functions fit for a task, in source order, each body once; `left_out` counts the others."""
    kept: dict[str, Function] = {}
    for path in files:
        lines, statements = parse(path, left_out)
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for owner, node in definitions(statements):
            function = read(lines, node, module, owner)
            if isinstance(function, str):
                left_out[function] += 1
            elif kept.setdefault(function.body, function) is not function:
                left_out["same body as another function"] += 1
    return list(kept.values())


def definitions(statements: Iterable[ast.stmt], owner: str = "") -> Iterator[tuple[str, Definition]]:
    """Yields functions and methods without decorators, each with the dotted names of its classes."""
    for node in statements:
        if isinstance(node, Definition) and not node.decorator_list:
            yield owner, node
        elif isinstance(node, ast.ClassDef) and not node.decorator_list:
            yield from definitions(node.body, f"{owner}.{node.name}".lstrip("."))


def first_line(node: ast.stmt) -> int:
    """Returns the line of a statement's first decorator, which ast does not count as a part, or its own."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def read(lines: list[str], node: Definition, module: str, owner: str) -> Function | str:
    """Returns one function out of the lines of its file, or the reason why it is unfit."""
    source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    if not PLAIN.fullmatch(source):
        return "too long, or with tabs, form feeds or characters beyond ASCII"
    code = textwrap.dedent(source)
    try:
        alone: Definition = ast.parse(code).body[0]  # type: ignore[assignment]
    except SyntaxError:  # a string with less indentation than its function kept dedent from working
        return "does not stand alone"
    doc = (ast.get_docstring(alone) or "").strip()
    without_doc = slice(1 if doc else 0, None)
    if [*map(ast.dump, alone.body[without_doc])] != [*map(ast.dump, node.body[without_doc])]:
        return "does not stand alone"  # dedent took indentation out of a string
    rows = code.split("\n")
    start = first_line(alone.body[0]) - 1
    end = alone.body[0].end_lineno if doc else start
    body = "\n".join(rows[end:]).strip("\n")
    if len(body) < MIN_BODY or start == 0:  # or all on one line
        return "too short"
    head, signature = "\n".join(rows[:end]), "\n".join(rows[:start])
    return Function(module, owner, node.name, code, head, body, f"{signature}\n{body}", doc)
