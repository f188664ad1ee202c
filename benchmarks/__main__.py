"""`python -m benchmarks` lists the benchmarks, `python -m benchmarks.NAME` runs one; `make bench` runs the
step's."""

from __future__ import annotations

import ast
from pathlib import Path

folder = Path(__file__).parent
for path in sorted([*folder.glob("[a-z]*.py"), *folder.glob("[a-z]*/__main__.py")]):
    name = path.stem if path.parent == folder else path.parent.name
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    print(f"python -m benchmarks.{name:<12} {first}")
