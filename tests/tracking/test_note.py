"""The description of a run: what it says, and that no text of the run becomes structure of the page."""

import pytest

from mft.files.json_file import read_json, write_json
from mft.tracking.note import note
from mft.tracking.params import TAG_LIMIT
from mft.tracking.record import Record
from mft.tracking.sender import sync
from mft.tracking.store import client_for
from tests.tracking.folders import CONFIG, write_run


@pytest.fixture
def run_dir(tmp_path, store, request):
    return write_run(tmp_path / "run", f"sqlite:///{store}/mlflow.db", experiment=request.node.name)


def test_it_says_how_the_run_went(run_dir):
    text = note(run_dir, "finished", CONFIG)
    assert text.startswith("**finished**, 6 of 6 steps, took 3 s\n")
    lines = [line.split() for line in text.splitlines()]
    assert "task first last best (step 6) test (step 4)" in [" ".join(line) for line in lines]
    assert ["docs", "0.5000", "0.1667", "0.1667", "0.2500"] in lines
    assert (
        ["optimizer.lr", "0.002"] in lines
        and ["peft", "lora"] in lines
        and ["model", str(run_dir / "final")] in lines
    )
    assert "mft train loss=coba optimizer.lr=0.002" in text


def test_a_running_run_shows_no_result_of_an_earlier_attempt(run_dir):
    text = note(run_dir, "", CONFIG)
    assert text.startswith("**running**\n") and "losses" not in text and "mft train" in text


def test_a_failed_run_says_why(run_dir):
    error = "ValueError: <img src=x> in ```row```"
    write_json(run_dir / "summary.json", {"status": "failed", "steps": 3, "error": error})
    assert f"**error**\n````\n{error}\n````" in note(run_dir, "failed", CONFIG)


def test_what_is_no_run_has_none(tmp_path):
    assert note(tmp_path, "finished", {}) == ""


HOSTILE = [
    "</pre><script>alert(1)</script>",
    "| a | ```` b",
    "x\n```\n# head",
    "[l](javascript:1)",
    "\x1b[31m",
]


def test_text_of_the_run_cannot_end_its_block(tmp_path, store):
    run_dir = write_run(tmp_path / "run", "", tasks=HOSTILE)
    write_json(run_dir / "overrides.json", {"overrides": [f"key={text}" for text in HOSTILE]})
    open_with = ""
    for line in note(run_dir, "finished", CONFIG).splitlines():
        if line and set(line) == {"`"}:
            if not open_with:
                open_with = line
            elif len(line) >= len(open_with):
                open_with = ""
        elif not open_with:
            assert not line or line.startswith("**")
    assert not open_with


def test_it_fits_into_a_tag_and_stays_whole(run_dir):
    write_json(run_dir / "overrides.json", {"overrides": [f"key{n}=" + "v" * 200 for n in range(300)]})
    tasks = {f"valid/loss/task{n}": 1.0 for n in range(200)}
    write_json(run_dir / "summary.json", read_json(run_dir / "summary.json") | {"last": tasks})
    text = note(run_dir, "finished", CONFIG)
    assert len(text) <= TAG_LIMIT and text.count("```") % 2 == 0 and "and 179 more tasks" in text


def test_a_description_that_a_person_has_written_stays(run_dir):
    sync(run_dir)
    record = Record.read(run_dir)
    client = client_for(record.uri)

    def described():
        return client.get_run(record.run_id).data.tags["mlflow.note.content"]

    assert described() == note(run_dir, "finished", CONFIG)
    write_json(run_dir / "overrides.json", {"overrides": ["loss=fame"]})
    sync(run_dir)
    assert "loss=fame" in described()
    client.set_tag(record.run_id, "mlflow.note.content", "the best one")
    sync(run_dir)
    assert described() == "the best one"
