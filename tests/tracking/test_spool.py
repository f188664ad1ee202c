"""A tracker's own files, damaged in every way: set aside or passed over, reported, and never the end of a run."""

import json

import pytest

from mft.tracking.delivery import mark_killed
from mft.tracking.mlflow import Mlflow
from mft.tracking.spool import Spool

OPEN = {"kind": "open", "key": "k", "experiment": "e", "run_name": "r", "params": {}, "tags": {}, "time": 1}
ROW = {"kind": "metrics", "step": 1, "values": {"a": 1.0, "b": "nan"}, "time": 2}
STATE = {"uri": "http://127.0.0.1:9", "run_id": "x", "experiment_id": "1", "sent": 5, "left": [{"path": "config.yaml"}]}


def written(run_dir, *lines, state=None):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (run_dir / "mlflow.spool.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    if state is not None:
        (run_dir / "mlflow.json").write_bytes(state.encode(errors="surrogateescape"))
    return run_dir


def changed(**values):
    return json.dumps(STATE | values)


BROKEN = ["", "null", "[]", "7", "{}", '{"uri": "x', "\udcff", "[" * 100_000]
BROKEN += [
    changed(uri=3),
    changed(sent=None),
    changed(sent=-1),
    changed(sent=True),
    changed(left={}),
    changed(left=[1]),
]
BROKEN += [changed(left=[{"path": 1}])]


@pytest.mark.parametrize("state", BROKEN)
def test_a_damaged_state_is_set_aside_and_made_anew(tmp_path, caplog, state):
    spool = Spool(written(tmp_path, OPEN, ROW, state=state))
    assert spool.state == {"uri": None, "run_id": None, "experiment_id": None, "sent": 0, "left": []}
    assert "mlflow.json: it is damaged; set aside as mlflow.json.damaged" in caplog.text
    assert (tmp_path / "mlflow.json.damaged").exists() and not (tmp_path / "mlflow.json").exists()
    spool.save()
    assert Spool(tmp_path).state == spool.state


LINES = ["null", "[]", "7", '"text"', "{}", '{"kind": []}', '{"kind": "metrics"}', "\udcff", "\0\0\0", "{" * 50]
LINES += [json.dumps(ROW | wrong) for wrong in ({"step": "1"}, {"values": []}, {"values": {"a": None}}, {"time": None})]
LINES += [json.dumps(ROW | {"values": {"a": "many"}}), '{"kind": "artifact", "path": null}', '{"kind": "close"}']


def test_lines_of_the_spool_that_are_no_records_are_passed_over_and_reported_once(tmp_path, caplog):
    spool = Spool(written(tmp_path, OPEN, *LINES, ROW, state=json.dumps(STATE | {"sent": 0})))
    for _ in range(2):
        assert [record for record, _ in spool.records(0)] == [OPEN, ROW]
    assert caplog.text.count("cannot be read and is left out") == len(LINES)
    assert spool.points_from(0) == {(1, "a"), (1, "b")}
    assert mark_killed(tmp_path) is True


def test_a_spool_that_has_lost_its_end_is_sent_again_from_its_start(tmp_path):
    assert Spool(written(tmp_path, OPEN, ROW, state=changed(sent=10**6))).state["sent"] == 0


@pytest.mark.parametrize("first", [ROW, "null", json.dumps(OPEN | {"key": None})])
def test_a_spool_without_its_first_record_is_set_aside(tmp_path, caplog, first):
    spool = Spool(written(tmp_path, first, ROW))
    assert not spool.path.exists() and (tmp_path / "mlflow.spool.jsonl.damaged").exists()
    assert "set aside" in caplog.text


def test_a_store_that_was_never_reached_is_known_to_sync(tmp_path):
    tracker = Mlflow(uri="http://127.0.0.1:9")
    tracker.open(tmp_path, {}, {})
    tracker.close("finished")
    assert Spool(tmp_path).state["uri"] == "http://127.0.0.1:9"
