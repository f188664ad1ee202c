"""The yaml files of the data groups compose, carry every field and build what they name."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mft.data.formats import Chat
from mft.data.packing import Concat, Pack, Pad
from mft.data.settings import DataSettings, LongSamples, PadTo
from mft.data.task import Task

CONF = Path(__file__).parents[2] / "conf"
TASKS = ["function_body", "docstring", "completion", "unit_test", "function_name"]


def composed(*overrides, more: Path | None = None):
    node = {"defaults": [{"task": []}, {"data": "pack"}, "_self_"], "cache_dir": "/cache"}
    ConfigStore.instance().store(name="only_data", node=OmegaConf.create(node))
    search = [f"hydra.searchpath=[file://{more}]"] if more else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("only_data", overrides=[*overrides, *search])
    OmegaConf.resolve(cfg)
    return cfg


@pytest.mark.parametrize("choice", ["pack", "pad", "concat"])
def test_data_files_have_every_setting(choice):
    node = composed(f"data={choice}").data
    assert set(node) == {field.name for field in fields(DataSettings)}
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataSettings), node))
    other = {"long_samples": LongSamples.keep} if choice == "concat" else {}
    assert settings == DataSettings(rows=settings.rows, **other)
    builder = instantiate(node.rows)
    assert builder == {"pack": Pack(), "pad": Pad(), "concat": Concat()}[choice]
    assert set(node.rows) - {"_target_"} == {field.name for field in fields(builder)}


def test_pad_to_reaches_the_row_builder():
    builder = instantiate(composed("data=pad", "data.pad_to=seq_length").data.rows)
    assert builder.pad_to == PadTo.seq_length


def test_tasks_compose_together_and_build():
    cfg = composed(f"task=[{','.join(TASKS)}]", "task.docstring.weight=3")
    tasks = {name: instantiate(node) for name, node in cfg.task.items()}
    assert list(tasks) == TASKS
    for name, task in tasks.items():
        assert set(cfg.task[name]) - {"_target_"} == {field.name for field in fields(Task)}
        assert isinstance(task, Task) and task.name == name and task.format == Chat()
        assert list(task.paths) == [f"/cache/demo/tasks/{name}"] and task.hint == "run `mft demo` first"
    assert tasks["docstring"].weight == 3


def test_a_task_of_the_users_own(tmp_path):
    (tmp_path / "task").mkdir()
    mine = {"defaults": [{"/format@format": "chat"}], "_target_": "mft.data.task.Task", "paths": ["/mine"]}
    (tmp_path / "task" / "mine.yaml").write_text("# @package task.mine\n" + yaml.safe_dump(mine))
    cfg = composed("task=[mine,docstring]", more=tmp_path)
    assert instantiate(cfg.task.mine) == Task(paths=["/mine"], format=Chat())
    assert list(cfg.task) == ["mine", "docstring"]
