"""A tracker's own file, damaged in every way: set aside, reported, and never the end of a run."""

import json

import pytest

from mft.tracking.mlflow import Mlflow
from mft.tracking.record import Record

SAVED = {"uri": "http://127.0.0.1:9", "run_id": "x", "places": {"metrics.jsonl": [1, 2, 3]}}


def changed(**values):
    return json.dumps(SAVED | values)


BROKEN = ["", "null", "[]", "7", "{}", '{"uri": "x', "\udcff", "[" * 100_000]
BROKEN += [changed(uri=3), changed(places=7), changed(started="1"), changed(tags=[]), changed(ended=True)]


@pytest.mark.parametrize("text", BROKEN)
def test_a_damaged_record_is_set_aside_and_made_anew(tmp_path, caplog, text):
    (tmp_path / "mlflow.json").write_bytes(text.encode(errors="surrogateescape"))
    record = Record.read(tmp_path)
    assert (record.uri, record.run_id, record.places) == ("", "", {}) and record.key
    assert "mlflow.json is damaged: renamed to mlflow.json.damaged" in caplog.text
    assert (tmp_path / "mlflow.json.damaged").exists() and not (tmp_path / "mlflow.json").exists()
    record.save(tmp_path)
    assert Record.read(tmp_path) == record


def test_the_record_of_an_earlier_version_names_its_run(tmp_path, caplog):
    earlier = {"uri": "http://h:1", "run_id": "r", "experiment_id": None, "sent": 5, "left": [{"path": "x"}]}
    (tmp_path / "mlflow.json").write_text(json.dumps(earlier))
    record = Record.read(tmp_path)
    assert (record.uri, record.run_id, record.places) == ("http://h:1", "r", {}) and not caplog.text


def test_a_store_that_was_never_reached_is_known_to_sync(tmp_path):
    tracker = Mlflow(uri="http://127.0.0.1:9")
    tracker.open(tmp_path, {}, {})
    tracker.close("stopped")
    record = Record.read(tmp_path)
    assert (record.uri, record.outcome, record.run_id) == ("http://127.0.0.1:9", "stopped", "")
