"""`python -m benchmarks` lists the benchmarks, `python -m benchmarks.NAME` runs one; `make bench` runs the
step's."""

from __future__ import annotations

import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    print(f"python -m benchmarks.{path.stem:<12} {first}")
