"""The standard library's own source as a list of functions: what the demo's tasks are cut from."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Not the library itself (installed packages, tests, an IDE, vendored or generated files), or mere tables.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    | {"encodings", "pydoc_data", "lib-dynload", "_vendor", "msilib", "__pycache__", "__phello__"}
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "__phello__", "antigravity", "this.py")
MAX_LINES, MAX_WIDTH, MAX_CHARACTERS = 90, 120, 4_200  # 4,200 characters are about 1,400 SmolLM2 tokens
MIN_LINES, MIN_CODE = 3, 80

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One top-level function or method. `code` is its dedented source with decorators; lines count from 0 in `code`."""

    module: str
    owner: str  # dotted classes around it, "" for a function of the module
    owner_head: str  # "class Fraction(numbers.Rational):", "" for a function of the module
    name: str
    code: str
    doc: str  # cleaned docstring, "" when there is none
    doc_lines: tuple[int, int]  # [start, end) of the docstring; empty range at the body's start when there is none
    same: bytes  # equal for functions whose bodies are the same code, whatever their names, comments and docstrings

    @property
    def path(self) -> str:
        """The dotted name a person would use: "textwrap.TextWrapper.fill"."""
        return ".".join(part for part in (self.module, self.owner, self.name) if part)

    @property
    def lines(self) -> list[str]:
        return self.code.split("\n")

    def head(self) -> str:
        """Everything before the body: decorators, signature, docstring."""
        return "\n".join(self.lines[: self.doc_lines[1]])

    def body(self) -> str:
        """Everything after signature and docstring, indented as in the function, without blank lines at its ends."""
        return "\n".join(self.lines[self.doc_lines[1] :]).strip("\n")

    def undocumented(self) -> str:
        """The code without its docstring."""
        return "\n".join(self.lines[: self.doc_lines[0]]) + "\n" + self.body()


def stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files(root: Path) -> list[Path]:
    """Source files of the library under `root`, sorted by path; tests are not among them (see `test_files`)."""
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if not SKIPPED_FOLDERS.intersection(folders) and not relative.parts[0].startswith(SKIPPED_PREFIXES):
            files.append(path)
    return sorted(files)


def test_files(root: Path) -> list[Path]:
    """`test_*.py` of Lib/test (not of its data folders), sorted; empty where a Python comes without Lib/test."""
    folder = root / "test"
    found = [*folder.glob("test_*.py"), *folder.glob("test_*/test_*.py")]
    return sorted(path for path in found if path.parent.name not in {"test_tools", "test_capi", "test_peg_generator"})


def module_name(path: Path, root: Path) -> str:
    """`root/json/decoder.py` → "json.decoder", `root/json/__init__.py` → "json"."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> tuple[str, ast.Module] | None:
    """Text and tree of a source file; None where it is not this Python's syntax or not in the encoding it declares."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        return text, ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


def functions(files: Iterable[Path], root: Path, left_out: Counter[str]) -> list[Function]:
    """The functions of `files` fit for a task, in source order, each body once; `left_out` counts the others."""
    found: list[Function] = []
    seen: set[bytes] = set()
    for path in files:
        parsed = parse(path)
        if parsed is None:
            left_out["file does not parse"] += 1
            continue
        text, tree = parsed
        lines = text.split("\n")
        for owners, node in definitions(tree.body):
            function, why = read(lines, node, module_name(path, root), owners)
            if function is None:
                left_out[why] += 1
                continue
            if function.same in seen:
                left_out["same body as another function"] += 1
                continue
            seen.add(function.same)
            found.append(function)
    return found


def definitions(
    body: list[ast.stmt], owners: tuple[ast.ClassDef, ...] = ()
) -> Iterator[tuple[tuple[ast.ClassDef, ...], Definition]]:
    """Functions and methods with the classes around them, also under `if` and `try`.

    Functions inside functions are not listed: they belong to the outer one.
    """
    for node in body:
        if isinstance(node, Definition):
            yield owners, node
        elif isinstance(node, ast.ClassDef):
            yield from definitions(node.body, (*owners, node))
        elif isinstance(node, ast.If | ast.Try):
            handlers = [item for handler in getattr(node, "handlers", []) for item in handler.body]
            yield from definitions([*node.body, *handlers, *node.orelse, *getattr(node, "finalbody", [])], owners)


def read(
    lines: list[str], node: Definition, module: str, owners: tuple[ast.ClassDef, ...]
) -> tuple[Function | None, str]:
    """One function out of the `lines` of its file, or None and the reason why it is unfit."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    source = "\n".join(lines[first - 1 : node.end_lineno])
    if not source.isascii() or "\t" in source or "\f" in source:
        return None, "tabs, form feeds or characters beyond ASCII"
    code = textwrap.dedent(source)
    rows = code.split("\n")
    if len(rows) > MAX_LINES or len(code) > MAX_CHARACTERS or max(map(len, rows)) > MAX_WIDTH:
        return None, "too long"
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a string with less indentation than its function
        return None, "does not stand alone"
    (copy,) = tree.body
    assert isinstance(copy, Definition)
    # In the source as it stands, not in the copy: dedent takes indentation out of multi-line strings too.
    dump = ast.dump(strip_docstring(copy))
    if dump != ast.dump(strip_docstring(node)):
        return None, "does not stand alone"
    if any("overload" in ast.dump(decorator) for decorator in node.decorator_list):
        return None, "only a signature"
    doc = inspect.cleandoc(ast.get_docstring(copy, clean=False) or "").strip()
    statements = copy.body[1:] if ast.get_docstring(copy, clean=False) is not None else copy.body
    if not statements or all(isinstance(item, ast.Pass | ast.Raise) for item in statements):
        return None, "only a signature"
    start = copy.body[0].lineno - 1
    end = copy.body[0].end_lineno or 0
    if statements is copy.body:
        start = end = next_code_line(rows, copy)
    if not rows[start].startswith("    ") or copy.body[0].lineno == copy.lineno:
        return None, "on one line"
    owner = ".".join(item.name for item in owners)
    head = class_head(owners[-1]) if owners else ""
    same = hashlib.blake2b(dump.encode(), digest_size=16).digest()
    function = Function(module, owner, head, node.name, code, doc, (start, end), same)
    if len(rows) < MIN_LINES or len(function.body()) < MIN_CODE:
        return None, "too short"
    return function, ""


def class_head(node: ast.ClassDef) -> str:
    """The line that opens a class."""
    bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
    return f"class {node.name}({bases}):" if bases else f"class {node.name}:"


def next_code_line(rows: list[str], node: Definition) -> int:
    """Line where the body of a function without docstring starts, with the comments that lead into it."""
    start = node.body[0].lineno - 1
    if isinstance(node.body[0], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        start = min([start, *(decorator.lineno - 1 for decorator in node.body[0].decorator_list)])
    while rows[start - 1].strip().startswith("#"):
        start -= 1
    return start


def strip_docstring(node: Definition) -> ast.Module:
    """The body without its docstring, for comparison."""
    documented = ast.get_docstring(node, clean=False) is not None
    return ast.Module(body=node.body[1:] if documented else node.body, type_ignores=[])
