"""Every yaml of conf/ composes, with exactly the fields of its class, each explained where it is
introduced."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

from mft.config.build import build
from mft.config.compose import compose, compose_resolved
from mft.config.overrides import check_overrides, group_options
from mft.config.schema import Launch, config_dir
from mft.config.validate import check
from mft.errors import UserError
from mft.training.settings import TrainSettings

GROUPS = [
    p.name for p in sorted(config_dir().iterdir()) if p.is_dir() and p.name not in ("local", "format", "task")
]
OPTIONS = [(group, option) for group in GROUPS for option in group_options(group)]


def rows(folder: Path) -> Path:
    """A folder with one task's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    line = '{"chat_rounds": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]}\n'
    (folder / "rows.jsonl").write_text(line * 4)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that give a run its data."""
    root = tmp_path_factory.mktemp("conf")
    return f"cache_dir={root}", f"data.paths=[{rows(root / 'task')}]"


@functools.cache
def composed(given: tuple[str, ...], group: str, option: str) -> DictConfig:
    """A config of an option, which several tests look at."""
    return compose_resolved([*([] if group == "model" else ["model=tiny"]), *given, f"{group}={option}"])


@pytest.mark.usefixtures("hub_may_be_asked")
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_passes_the_check(group: str, option: str, given: tuple[str, ...]) -> None:
    needs_input = {
        ("experiment", "demo"),
        ("experiment", "loss_study"),
        ("model", "demo"),
    }  # made by `mft demo`
    cfg = copy.deepcopy(composed(given, group, option))
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


COMPONENTS = ("data", "dist", "format", "loss", "model", "optimizer", "peft", "scheduler", "task", "tracking")
CHOICES = [(group, option) for group in COMPONENTS for option in group_options(group) if option != "none"]


@pytest.mark.parametrize("group, option", CHOICES, ids="/".join)
def test_every_component_is_composed_with_every_field_of_its_class(
    group: str, option: str, given: tuple[str, ...]
) -> None:
    place = {"data": "data.rows", "format": "task.docstring.format"}.get(group, group)
    if group == "tracking":
        place = f"{group}.{option}"
    if group == "task":
        node, place = compose([f"{group}=[{option}]"]), f"{group}.{option}"
    elif group == "format":
        node = compose(["task=[docstring]", f"format@{place}={option}"])
    else:
        node = composed(given, group, option)
    for part in place.split("."):
        node = node._get_node(part)
    module, _, name = node._get_node("_target_")._value().rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if group != "data":  # pad_to is a setting of `data`
        assert {f.name for f in dataclasses.fields(cls)} == {k for k in node if not k.startswith("_")}


FILES = [path for group in COMPONENTS for path in sorted((config_dir() / group).glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(config_dir())))
def test_component_yaml_explains_every_field_that_it_introduces(path: Path) -> None:
    text = path.read_text()
    values = yaml.safe_load(text) or {}
    bases = [path.with_name(f"{name}.yaml") for name in values.get("defaults", ()) if isinstance(name, str)]
    shared = {key for base in bases if base.exists() for key in fields_of(base)}
    for key in values.keys() - shared:
        if key not in (
            "defaults",
            "_target_",
            "rows",
        ):  # the head of data/pad and data/pack explains their rows
            assert explained(text, key), f"{path}: {key} has no comment"


def fields_of(path: Path) -> set[str]:
    """Returns the keys of a yaml and of those beside it that its defaults list names."""
    values = yaml.safe_load(path.read_text())
    names = [name for name in values.get("defaults", ()) if isinstance(name, str) and name != "_self_"]
    return set(values).union(*(fields_of(path.with_name(f"{name}.yaml")) for name in names))


@pytest.mark.parametrize("group", COMPONENTS)
def test_what_options_share_is_neither_listed_nor_chosen(group: str) -> None:
    assert not [option for option in group_options(group) if option == "base" or option.startswith("_")]
    for path in (config_dir() / group).glob("_*.yaml"):
        with pytest.raises(UserError, match=f"{group} takes the name of an option.*Allowed: "):
            check_overrides([f"{group}={path.stem}"])


def test_a_family_states_only_its_differences() -> None:
    base = yaml.safe_load((config_dir() / "model" / "_base.yaml").read_text())
    for option in group_options("model"):
        values = yaml.safe_load((config_dir() / "model" / f"{option}.yaml").read_text())
        assert not [key for key, value in values.items() if key in base and base[key] == value], option


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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
