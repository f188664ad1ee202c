"""Names of data sets, resolved by `datasets` itself on a folder as a repository of the hub is laid out."""

import sys

import pytest

from mft.data import hub
from mft.data.cache.store import prepare
from mft.data.settings import BadRows, DataSettings
from mft.data.task import Task, all_tasks
from mft.errors import UserError
from tests.data.conftest import chat, write

CARD = """---
configs:
- config_name: pairs
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
- config_name: talks
  data_files: talks.jsonl
---
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`talks`, a data set of two configs: pairs with the splits train and test, and talks."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    place = tmp_path / "chatter"
    pairs = [{"prompt": f"q{i}", "answer": "a", "score": i / 7} for i in range(40)]
    write(place / "train.jsonl", pairs)
    write(
        place / "talks.jsonl", [chat("q", "a", "r", "b"), {"chat_rounds": []}, chat("only a question", "a")]
    )
    write(place / "test.jsonl", pairs[:5])
    (place / "README.md").write_text(CARD)
    return place


def test_splits_and_configs_become_samples(folder, tmp_path, encoder):
    def store(name, **settings):
        task = Task("t", [name])
        return prepare(task, encoder, DataSettings(split=[1, 0, 0], **settings), tmp_path / "cache")

    train, test = store(f"hf:{folder}::pairs"), store(f"hf:{folder}:test:pairs")
    assert (len(train), len(test)) == (40, 5) and train.report["format"] == "prompt_answer"
    assert train.origin(6) == f"hf:{folder}::pairs:7"
    files = store(str(folder / "train.jsonl"))
    assert [a.tolist() for i in range(40) for a in train.sample(i)] == [
        a.tolist() for i in range(40) for a in files.sample(i)
    ]
    assert len(store(f"hf:{folder}:train[10:17]:pairs")) == 7
    talks = store(f"hf:{folder}:train:talks", bad_rows=BadRows.skip)
    (bad,) = talks.dropped()
    assert (len(talks), bad["line"], bad["field"], bad["file"]) == (
        2,
        2,
        "chat_rounds",
        f"hf:{folder}:train:talks",
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:{}:valid:pairs", r"Unknown split .?valid.*train.*test.*The form is hf:owner/name"),
        ("hf:{}:train:pears", r"'pears' not found.*'pairs', 'talks'.*The form is hf:owner/name"),
        ("hf:{}", r"Config name is missing.*pairs.*talks.*The form is hf:owner/name"),
        ("hf:nobody/nothing", r"the data set cannot be loaded.*Without a network, download it"),
        ("hf:{}/gone", r"the data set cannot be loaded.*Without a network, download it"),
        ("hf:a:b:c:d", r"not a valid dataset name; expected hf:owner/name\[@revision\]"),
        ("hf:", "not a valid dataset name"),
    ],
)
def test_mistakes_are_sentences(folder, tmp_path, encoder, name, says):
    name = name.format(folder)
    with pytest.raises(UserError, match=says) as raised:
        prepare(Task("t", [name]), encoder, DataSettings(), tmp_path / "cache")
    assert str(raised.value).startswith(f"{name}: ") and "\n" not in str(raised.value)


def test_columns_that_fit_no_format_are_told(folder, tmp_path, encoder):
    write(folder / "talks.jsonl", [{"ask": "q", "tell": "a"}] * 3)
    with pytest.raises(
        UserError, match=r"task\.t: no format fits its rows; fields of the first one: 'ask, tell'"
    ):
        prepare(Task("t", [f"hf:{folder}:train:talks"]), encoder, DataSettings(), tmp_path / "cache")


def test_tasks_are_named_after_data_sets():
    names = ["hf:owner/one", "hf:owner/two@main", "hf:owner/three:train[:5%]", "hf:owner/four@v1:test:short"]
    assert [task.name for task in all_tasks({}, names)] == ["one", "two", "three", "four"]


def test_without_the_package_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"need the package datasets: pip install 'mft\[hub\]'"):
        hub.load("hf:owner/name")
