"""Every yaml of conf/ composes, lists exactly the fields of its class and explains each of them."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mft.config.build import build
from mft.config.compose import compose, compose_resolved
from mft.config.overrides import group_options
from mft.config.schema import Launch, config_dir
from mft.config.validate import check
from mft.training.settings import TrainSettings

GROUPS = [p.name for p in sorted(config_dir().iterdir()) if p.is_dir() and p.name not in ("local", "format", "task")]
OPTIONS = [(group, option) for group in GROUPS for option in group_options(group)]


def rows(folder: Path) -> Path:
    """A folder with one task's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    line = '{"chat_rounds": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]}\n'
    (folder / "rows.jsonl").write_text(line * 4)
    return folder


@pytest.mark.parametrize("group, option", OPTIONS, ids="/".join)
def test_every_option_composes_and_passes_the_check(group: str, option: str, tmp_path: Path) -> None:
    overrides = [f"cache_dir={tmp_path}", f"data.paths=[{rows(tmp_path / 'task')}]"]
    needs_input = {("experiment", "demo"), ("experiment", "loss_study"), ("model", "demo")}  # made by `mft demo`
    cfg = compose_resolved([*([] if group == "model" else ["model=tiny"]), *overrides, f"{group}={option}"])
    if (group, option) in needs_input:
        return
    if option == "auto":
        cfg.model.path = "owner/name"
    if option == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    check(cfg, world=1)


@pytest.mark.parametrize("task", group_options("task"))
def test_every_task_composes_under_its_own_name(task: str, tmp_path: Path) -> None:
    cfg = compose_resolved([f"task=[{task}]", f"cache_dir={tmp_path}"])
    built = build(cfg.task[task], f"task.{task}")
    assert built.paths == [str(tmp_path / "demo" / "tasks" / task)]


def test_several_tasks_may_be_chosen_and_each_of_their_fields_set() -> None:
    cfg = compose_resolved(["task=[docstring,completion]", "task.docstring.weight=3"])
    assert list(cfg.task) == ["docstring", "completion"]
    assert cfg.task.docstring.weight == 3 and cfg.task.completion.weight == 1


def targets() -> list[Path]:
    paths = sorted(config_dir().rglob("*.yaml"))
    found = [path for path in paths if re.search(r"^\s*_target_:", path.read_text(), re.M)]
    assert len(found) > 20
    return found


@pytest.mark.parametrize("path", targets(), ids=lambda p: str(p.relative_to(config_dir())))
def test_component_yaml_lists_and_explains_every_field(path: Path) -> None:
    group = path.relative_to(config_dir()).parts[0]
    if group == "data":
        group, option = "data.rows", path.stem
        overrides = [f"data={option}"]
    elif group in ("tracking", "task"):
        overrides = [f"{group}=[{path.stem}]"]
        group = f"{group}.{path.stem}"
    elif group == "format":
        overrides, group = ["task=[docstring]", f"format@task.docstring.format={path.stem}"], "task.docstring.format"
    else:
        overrides = [f"{group}={path.stem}"]
    node = compose(overrides)
    for part in group.split("."):
        node = node._get_node(part)
    module, _, name = node._get_node("_target_")._value().rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if group != "data.rows":  # pad_to is a setting of `data`
        assert {f.name for f in dataclasses.fields(cls)} == {k for k in node if not k.startswith("_")}
    text = path.read_text()
    for key in yaml.safe_load(text) or {}:
        if key not in ("defaults", "_target_", "rows"):  # the head of data/pad and data/pack explains their rows
            assert explained(text, key), f"{path}: {key} has no comment"


def explained(text: str, key: str) -> bool:
    """Whether a key's line, or a line right above its paragraph, carries a comment."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
    above = at - 1
    while above >= 0 and lines[above].strip() and not lines[above].startswith("#"):
        above -= 1
    return "#" in lines[at] or (above >= 0 and lines[above].startswith("#"))


@pytest.mark.parametrize("name, schema", [("train.yaml", TrainSettings), ("launch/processes.yaml", Launch)])
def test_settings_yaml_lists_every_field(name: str, schema: type) -> None:
    keys = yaml.safe_load((config_dir() / name).read_text())
    assert set(keys) == {f.name for f in dataclasses.fields(schema)}


def test_schema_defaults_are_those_of_the_yaml() -> None:
    cfg = compose_resolved([])
    for field in dataclasses.fields(TrainSettings):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert cfg.train[field.name] == default, field.name


def test_check_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = f"""
import sys
from mft.config.compose import compose_resolved
from mft.config.validate import check
check(compose_resolved(["model=tiny", "cache_dir={tmp_path}", "data.paths=[{rows(tmp_path / "task")}]"]), world=1)
heavy = sorted({{"torch", "transformers", "peft", "accelerate", "mlflow", "deepspeed"}} & set(sys.modules))
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
