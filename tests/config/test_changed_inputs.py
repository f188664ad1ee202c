"""Files that change between the check of a run, or of a sweep's later job, and their reading end it in a
sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mft.batch import Message
from mft.config.compose import compose_resolved
from mft.data.cache.store import prepare
from mft.data.formats import Chat
from mft.data.settings import DataSettings
from mft.data.task import Task
from mft.data.template import Template
from mft.data.tokenize import Encoder
from mft.errors import UserError
from mft.launch import job
from mft.launch.launch import launch
from tests.tiny_runs import train, two_tasks, write_task

CODE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@dataclass
class Meddling(Chat):
    """Adds a row to the file while it is read, once."""

    file: str = ""

    def messages(self, row: Any) -> list[Message]:
        if self.file:
            with open(self.file, "a") as stream:
                stream.write("\n")
            self.file = ""
        return super().messages(row)


def test_a_token_cache_is_never_named_after_other_rows(tmp_path: Path, tokenizer) -> None:
    file = write_task(tmp_path / "x", 6) / "rows.jsonl"
    encoder, settings = Encoder(tokenizer, Template()), DataSettings(seq_length=512)
    with pytest.raises(
        UserError,
        match=r"task\.x: its files have changed while they were read .*start again once they are written",
    ):
        prepare(Task("x", [str(file)], format=Meddling(str(file))), encoder, settings, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()], (
        "nothing is left of it"
    )
    task = Task("x", [str(file)], format=Meddling())
    store = prepare(task, encoder, settings, tmp_path / "cache")
    assert len(store) == 6 and store.contents == task.fingerprint(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        (
            "tasks/adding/rows.jsonl",
            r"the data of task adding has changed \(.*adding\) since this run was checked",
        ),
        ("t.jinja", r"the template file has changed \(.*t.jinja\) since this run was checked"),
        (
            "first/final/adapter_model.safetensors",
            r"the adapter has changed \(.*final\) since this run was checked",
        ),
    ],
)
def test_a_run_trains_on_what_was_checked_or_not_at_all(
    tmp_path: Path, cache_dir: Path, file: str, sentence: str
) -> None:
    (tmp_path / "t.jinja").write_text(CODE)
    train(tmp_path, cache_dir, out="first")
    given = ["debug=fast", "launch=inline", f"cache_dir={cache_dir}", two_tasks(tmp_path / "tasks")]
    given += [f"data.template={tmp_path}/t.jinja", f"peft.path={tmp_path}/first/final"]
    later = job.checked(compose_resolved([*given, f"output_dir={tmp_path}/later"]), given)
    changed = tmp_path / file
    content = changed.read_bytes()
    changed.write_bytes(content + b"\n")
    with pytest.raises(UserError, match=sentence):
        launch(later, tmp_path / "later")
    assert not (tmp_path / "later" / "report" / "data.json").exists()
    assert not (tmp_path / "later" / "metrics.jsonl").exists()
    changed.write_bytes(content)
    assert launch(later, tmp_path / "later")["status"] == "finished"
