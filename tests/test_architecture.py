"""The rules of the house, read off the imports: they point down only, and components do not know each other."""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

import mft

ROOT = Path(mft.__file__).parent
FLOOR = {
    **dict.fromkeys(("errors", "batch", "machine", "plugins", "credentials", "screen", "checksums", "jsonfile"), 0),
    **dict.fromkeys(("ranges", "foreign", "streams"), 0),
    **dict.fromkeys(("data", "model", "loss", "optim", "schedule", "dist", "tracking"), 1),
    **dict.fromkeys(
        ("metrics", "checkpoint", "resume", "evaluate", "loop", "progress", "answers", "plots", "panels", "provenance"),
        2,
    ),
    **dict.fromkeys(("config", "places", "overrides", "inert", "interpolations", "yaml_files", "components"), 3),
    **dict.fromkeys(("hydra_node", "build", "compose", "identity", "inputs"), 3),
    **dict.fromkeys(("rundir", "dataset", "feed", "run", "summary"), 3),
    **dict.fromkeys(
        (
            "memory",
            "worker",
            "processes",
            "failures",
            "output",
            "hosts",
            "meeting",
            "launch",
            "job",
            "sweep",
            "runs",
            "datacommands",
            "cli",
            "demo",
        ),
        4,
    ),
}
COMPONENTS = {name for name, floor in FLOOR.items() if floor == 1}
CONTRACTS = {"mft.loss.base", "mft.dist.base", "mft.tracking.base"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "manager"}
HEAVY = {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "mlflow", "matplotlib"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(("mft", *path.relative_to(ROOT).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.AST, top_only: bool = False) -> set[str]:
    found = set()
    top = [node for node in tree.body if not isinstance(node, ast.If)] if isinstance(tree, ast.Module) else []
    for node in top if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def test_every_module_has_a_floor() -> None:
    assert {part(name) for name in modules() if part(name)} == set(FLOOR)


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
        part for path in Path(__file__).parent.rglob("test_*.py") for part in path.relative_to(ROOT.parent).parts
    }
    assert "dist" in folders
    assert not [name for name in folders for pattern in passed_over if fnmatch(name, pattern)]


def test_no_module_is_named_after_nothing() -> None:
    assert not [name for name in modules() if set(name.split(".")) & FORBIDDEN_NAMES]
