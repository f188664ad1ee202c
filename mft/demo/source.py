"""The standard library's own source as a list of functions: what the demo's tasks are cut from."""

from __future__ import annotations

import ast
import inspect
import sysconfig
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
    }
    | {"encodings", "pydoc_data", "lib-dynload", "_vendor", "msilib", "__pycache__", "__phello__"}
)
"""Not the library itself (installed packages, tests, an IDE, vendored or generated files), or tables only."""

SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "__phello__", "antigravity", "this.py")

SKIPPED_TESTS = frozenset({"test_tools", "test_capi", "test_peg_generator"})

MAX_LINES, MAX_WIDTH, MAX_CHARACTERS = 90, 120, 4_200  # 4,200 characters are about 1,400 SmolLM2 tokens
MIN_LINES, MIN_CODE = 3, 80

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One top-level function or method."""

    module: str
    """Its dotted name."""

    owner: str
    """The dotted classes around it, "" for a function of the module."""

    owner_head: str
    """The line that opens its class: "class Fraction(numbers.Rational):"; "" for a function of the module."""

    name: str
    """Its own name, without module and classes."""

    code: str
    """Its dedented source, with decorators."""

    doc: str
    """The cleaned docstring, "" where it has none."""

    doc_lines: tuple[int, int]
    """[start, end) of the docstring in `code`, from 0; empty, at the body's start, where it has none."""

    same: str
    """Equal for functions whose bodies are the same code, whatever their names, comments and docstrings."""

    @property
    def path(self) -> str:
        """The dotted name a person would use: "textwrap.TextWrapper.fill"."""
        return ".".join(part for part in (self.module, self.owner, self.name) if part)

    @property
    def lines(self) -> list[str]:
        """The lines of `code`."""
        return self.code.split("\n")

    def head(self) -> str:
        """Returns everything before the body: decorators, signature, docstring."""
        return "\n".join(self.lines[: self.doc_lines[1]])

    def body(self) -> str:
        """Returns what follows signature and docstring, indented as there, without blank lines around."""
        return "\n".join(self.lines[self.doc_lines[1] :]).strip("\n")

    def undocumented(self) -> str:
        """Returns the code without its docstring."""
        return "\n".join(self.lines[: self.doc_lines[0]]) + "\n" + self.body()


def stdlib_root() -> Path:
    """Returns the folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files(root: Path) -> list[Path]:
    """Returns the source files of the library, sorted; tests are not among them (see `test_files`)."""
    relative = {path: path.relative_to(root).parts for path in root.rglob("*.py")}
    return sorted(
        path
        for path, parts in relative.items()
        if not SKIPPED_FOLDERS.intersection(parts[:-1]) and not parts[0].startswith(SKIPPED_PREFIXES)
    )


def test_files(root: Path) -> list[Path]:
    """Returns `test_*.py` of Lib/test, sorted; none where a Python comes without it."""
    files = [*(root / "test").glob("test_*.py"), *(root / "test").glob("test_*/test_*.py")]
    return sorted(path for path in files if path.parent.name not in SKIPPED_TESTS)


def module_name(path: Path, root: Path) -> str:
    """`root/json/decoder.py` → "json.decoder", `root/json/__init__.py` → "json"."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def parse(path: Path) -> tuple[list[str], ast.Module] | None:
    """Returns lines and tree of a file; None for syntax or encodings that this Python does not read."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        return text.split("\n"), ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


def functions(files: Iterable[Path], root: Path, left_out: Counter[str]) -> list[Function]:
    """Returns the functions fit for a task, in source order, each body once; `left_out` counts the others."""
    kept: dict[str, Function] = {}
    for path in files:
        if (parsed := parse(path)) is None:
            left_out["file does not parse"] += 1
            continue
        lines, tree = parsed
        for owners, node in definitions(tree.body):
            function = read(lines, node, module_name(path, root), owners)
            if isinstance(function, str):
                left_out[function] += 1
            elif function.same in kept:
                left_out["same body as another function"] += 1
            else:
                kept[function.same] = function
    return list(kept.values())


def definitions(
    body: Iterable[ast.AST], owners: tuple[ast.ClassDef, ...] = ()
) -> Iterator[tuple[tuple[ast.ClassDef, ...], Definition]]:
    """Yields functions and methods with the classes around them, also under `if` and `try`."""
    for node in body:
        if isinstance(node, Definition):
            yield owners, node
        elif isinstance(node, ast.ClassDef):
            yield from definitions(node.body, (*owners, node))
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from definitions(ast.iter_child_nodes(node), owners)


def read(
    lines: list[str], node: Definition, module: str = "", owners: tuple[ast.ClassDef, ...] = ()
) -> Function | str:
    """Returns one function out of the lines of its file, or the reason why it is unfit."""
    source = "\n".join(lines[_first_line(node) - 1 : node.end_lineno])
    code = textwrap.dedent(source)
    rows = code.split("\n")
    if not source.isascii() or "\t" in source or "\f" in source:
        return "tabs, form feeds or characters beyond ASCII"
    if len(rows) > MAX_LINES or len(code) > MAX_CHARACTERS or max(map(len, rows)) > MAX_WIDTH:
        return "too long"
    try:
        (copy,) = ast.parse(code).body
    except SyntaxError:  # a string with less indentation than its function
        return "does not stand alone"
    assert isinstance(copy, Definition)
    documented = ast.get_docstring(copy, clean=False) is not None
    statements = copy.body[documented:]
    same = "".join(map(ast.dump, statements))
    if same != "".join(map(ast.dump, node.body[documented:])):  # dedent took indentation out of a string
        return "does not stand alone"
    only_signature = all(isinstance(item, ast.Pass | ast.Raise) for item in statements)
    if only_signature or any("overload" in ast.dump(decorator) for decorator in node.decorator_list):
        return "only a signature"
    start, end = _first_line(copy.body[0]) - 1, copy.body[0].end_lineno or 0
    if not documented:
        while rows[start - 1].strip().startswith("#"):  # comments that lead into the body belong to it
            start -= 1
        end = start
    if copy.body[0].lineno == copy.lineno or not rows[start].startswith("    "):
        return "on one line"
    doc = inspect.cleandoc(ast.get_docstring(copy) or "").strip()
    owner, owner_head = ".".join(item.name for item in owners), _class_head(owners[-1]) if owners else ""
    function = Function(module, owner, owner_head, node.name, code, doc, (start, end), same)
    return "too short" if len(rows) < MIN_LINES or len(function.body()) < MIN_CODE else function


def _first_line(node: ast.stmt) -> int:
    """The line where a statement starts, with its decorators."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _class_head(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
    return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
