"""How runs that differ are told apart in words, and an identity read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mft.config.compose import compose_resolved
from mft.config.identity import CONTENTS, VERSION, identity_of
from mft.config.schema import freeze
from mft.errors import UserError
from mft.files.json_file import write_json
from mft.launch import job
from tests.tiny_runs import two_tasks


class Stage:
    """Runs that are checked and written down without being trained."""

    def __init__(self, root: Path, cache: Path, tiny_folder: Path):
        self.root = root
        self.paths = two_tasks(root)
        shutil.copytree(tiny_folder, root / "base")
        (root / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
        adapter = root / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").write_text("weights")
        self.given = [
            "model=auto",
            f"model.path={root}/base",
            f"cache_dir={cache}",
            "tracking=none",
            "launch=inline",
        ]
        self.given += [
            f"output_dir={root}/o",
            f"data.template={root}/t.jinja",
            f"peft.path={adapter}",
            self.paths,
        ]

    def checked(self, *overrides: str) -> job.Job:
        return job.checked(compose_resolved([*self.given, *overrides]), [])

    def leave(self, *overrides: str) -> None:
        current = self.checked(*overrides)
        freeze(current.cfg, self.root / "o" / "config.yaml")
        write_json(self.root / "o" / "identity.json", current.identity.as_json())

    def said(self, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            self.checked(*overrides).choose(dated=False)
        return str(caught.value).replace(str(self.root), "")


@pytest.fixture
def stage(tmp_path: Path, cache_dir: Path, tiny_folder: Path) -> Stage:
    return Stage(tmp_path, cache_dir, tiny_folder)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("adding/rows.jsonl", "the data of task adding has changed (/adding)"),
        ("t.jinja", "the template file has changed (/t.jinja)"),
        ("base/tokenizer.json", f"{CONTENTS['tokenizer'][0]} has changed (/base)"),
        ("base/config.json", "the base model (its weights or config.json) has changed (/base)"),
        ("adapter/adapter_model.safetensors", "the adapter has changed (/adapter)"),
    ],
)
def test_changed_contents_are_named_and_the_config_is_not_blamed(
    stage: Stage, file: str, sentence: str
) -> None:
    stage.leave()
    assert stage.checked().choose(dated=False)[1]
    with (stage.root / file).open("a") as stream:
        stream.write("\n")
    said = stage.said()
    assert f"holds a run on other inputs: {sentence}; choose" in said and "config:" not in said
    assert sentence in stage.said(f"train.resume={stage.root}/o")


def test_changed_values_are_named_with_both_values(stage: Stage) -> None:
    stage.leave("optimizer.lr=1e-3", "loss=coba", "loss.tau=4", "train.per_device_batch_size=2")
    said = stage.said("loss=famo", "train.seed=3", "data.seq_length=99", "train.per_device_batch_size=4")
    assert "holds a run of another config: " in said and "other inputs" not in said
    for difference in (
        "optimizer.lr=0.001 there, null here",
        "loss=coba there, famo here",
        "train.seed=42 there, 3 here",
        "data.seq_length=1024 there, 99 here",
        "global batch=2 there, 4 here",
    ):
        assert difference in said
    assert "loss.tau" not in said, "what belongs to another loss is no difference of its own"


def test_the_order_of_tasks_and_other_tasks_are_named(stage: Stage) -> None:
    stage.leave()
    adding, naming = stage.root / "adding", stage.root / "naming"
    said = stage.said(f"data.paths=[{naming},{adding}]")
    assert "the order of the tasks has changed (adding, naming there, naming, adding here)" in said
    assert "another config" not in said
    assert "the tasks are adding, naming there and adding here" in stage.said(f"data.paths=[{adding}]")


def test_another_path_is_named_with_both_paths(stage: Stage) -> None:
    stage.leave()
    shutil.copytree(stage.root / "adapter", stage.root / "second")
    (stage.root / "second" / "adapter_model.safetensors").write_text("other")
    said = stage.said(f"peft.path={stage.root}/second")
    assert "the adapter differs (/adapter there, /second here)" in said
    assert "the adapter differs (/adapter there, null here)" in stage.said("peft.path=null")


def test_longer_runs_are_the_same_run(stage: Stage) -> None:
    stage.leave("train.max_steps=3")
    assert stage.checked("train.max_steps=9").choose(dated=False) == (stage.root / "o", True)


SHAPES = ["[]", "{}", "3", '{"identity": 1, "base": "x"}', '{"version": 2, "identity": "a", "base": "b"}']


@pytest.mark.parametrize("text", SHAPES)
def test_a_damaged_identity_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "identity.json").write_text(text)
    assert identity_of(tmp_path) is None


def test_an_identity_is_read_back_as_it_was(stage: Stage) -> None:
    stage.leave()
    assert identity_of(stage.root / "o") == stage.checked().identity
    text = (stage.root / "o" / "identity.json").read_text()
    assert json.loads(text)["version"] == VERSION and str(stage.root) not in text
