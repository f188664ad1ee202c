"""The rules of the house, read off the imports: they point down only, and components do not know each
other."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

import mft

ROOT = Path(mft.__file__).parent
FLOOR = {
    **dict.fromkeys(
        ("errors", "batch", "cards", "hardware", "objective", "console", "files", "run_folder"), 0
    ),
    **dict.fromkeys(("data", "model", "loss", "optim", "distributed", "tracking"), 1),
    "training": 2,
    **dict.fromkeys(("config", "estimate"), 3),
    **dict.fromkeys(("assembly", "run", "launch", "doctor", "plan", "rehearsal", "runs", "comparison"), 4),
    **dict.fromkeys(("sweep", "verify"), 5),
    **dict.fromkeys(("commands", "demo", "cli"), 6),
}
"""A folder or module of mft → its floor: vocabulary, components, training, config, runs, sweeps, commands."""

COMPONENTS = {name for name, floor in FLOOR.items() if floor == 1}
CONTRACTS = {"mft.loss.base", "mft.distributed.engine", "mft.tracking.base"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "manager"}
HEAVY = {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "mlflow", "matplotlib"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(("mft", *path.relative_to(ROOT).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


NAMED = re.compile(r"(mft(?:\.\w+)+)(?::\w+)?")
"""A module, or a module:function, that a string names: it is imported when it is needed."""


def imports(tree: ast.AST, top_only: bool = False) -> set[str]:
    """Returns the modules that a module imports: by statements, and by strings as "module:function"."""
    found = set()
    top = [node for node in tree.body if not isinstance(node, ast.If)] if isinstance(tree, ast.Module) else []
    for node in top if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif not top_only and isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {match[1] for match in [NAMED.fullmatch(node.value)] if match}
    return found


def graph() -> dict[str, set[str]]:
    """Returns the modules that each module imports."""
    trees = modules()
    return {name: (imports(tree) & set(trees)) - {name, "mft"} for name, tree in trees.items()}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that reach each other, by Kosaraju's two walks."""
    backwards: dict[str, set[str]] = {name: set() for name in arrows}
    for name, imported in arrows.items():
        for other in imported:
            backwards[other].add(name)

    def walk(name: str, along: dict[str, set[str]], seen: set[str], order: list[str]) -> None:
        seen.add(name)
        for other in sorted(along[name] - seen):
            if other not in seen:
                walk(other, along, seen, order)
        order.append(name)

    order: list[str] = []
    seen: set[str] = set()
    for name in sorted(arrows):
        if name not in seen:
            walk(name, arrows, seen, order)
    groups, seen = [], set()
    for name in reversed(order):
        if name not in seen:
            group: list[str] = []
            walk(name, backwards, seen, group)
            groups.append(sorted(group))
    return [group for group in groups if len(group) > 1]


def part(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def test_every_module_has_a_floor() -> None:
    assert {part(name) for name in modules() if part(name)} == set(FLOOR)


def test_no_module_reaches_itself() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles(graph()) == []


def test_imports_go_down_only_and_components_do_not_know_each_other() -> None:
    wrong = []
    for name, tree in modules().items():
        here = part(name)
        for imported in imports(tree):
            there = part(imported)
            if not imported.startswith("mft.") or there not in FLOOR or there == here:
                continue
            if FLOOR[there] > FLOOR[here]:
                wrong.append(f"{name} imports {imported}, which is above it")
            if {here, there} <= COMPONENTS:
                wrong.append(f"{name} imports {imported}: components do not know each other")
            known = any(imported.startswith(c) or c.startswith(imported) for c in CONTRACTS)
            if FLOOR[here] == 2 and there in COMPONENTS and not known:
                wrong.append(f"{name} imports {imported}: floor 2 knows contracts, not choices")
    assert not wrong, "\n".join(wrong)


def test_hydra_and_omegaconf_stay_in_the_assembly() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, tree in modules().items()
        for imported in imports(tree)
        if imported.split(".")[0] in ("hydra", "omegaconf") and FLOOR.get(part(name), 4) < 3
    ]
    assert not wrong, "\n".join(wrong)


def test_entry_points_and_component_classes_import_nothing_heavy_at_the_top() -> None:
    targets = {
        line.split()[-1].rpartition(".")[0]
        for path in (ROOT.parent / "conf").rglob("*.yaml")
        for line in path.read_text().splitlines()
        if line.strip().startswith("_target_: mft.")
    }
    assert len(targets) > 10
    entry = {name for name in modules() if FLOOR.get(part(name), 4) >= 3}
    wrong = [
        f"{name} imports {imported}"
        for name, tree in modules().items()
        if name in targets | entry
        for imported in imports(tree, top_only=True)
        if imported.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_tests_is_collected(pytestconfig: pytest.Config) -> None:
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {
        part
        for path in Path(__file__).parent.rglob("test_*.py")
        for part in path.relative_to(ROOT.parent).parts
    }
    assert "distributed" in folders
    assert not [name for name in folders for pattern in passed_over if fnmatch(name, pattern)]


def test_no_module_is_named_after_nothing() -> None:
    assert not [name for name in modules() if set(name.split(".")) & FORBIDDEN_NAMES]
