"""The log every run keeps, and several trackers at once."""

import json
import math

from mft.tracking.base import FanOut, Jsonl, Tracker


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_resume_cuts_the_steps_that_are_trained_again(tmp_path):
    first = Jsonl()
    first.open(tmp_path, {}, {})
    for step in (10, 20, 30):
        first.log(step, {"train/loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')  # killed while writing
    again = Jsonl()
    again.open(tmp_path, {}, {}, step=20)
    again.log(30, {"train/loss": 7.0})
    assert lines(tmp_path) == [
        {"step": 10, "train/loss": 0.1},
        {"step": 20, "train/loss": 0.05},
        {"step": 30, "train/loss": 7.0},
    ]


def test_what_is_not_finite_is_null_in_plain_json(tmp_path):
    tracker = Jsonl()
    tracker.open(tmp_path, {}, {})
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]


def test_a_tracker_that_breaks_is_told_once_and_stops_nobody(tmp_path, caplog):
    class Breaks(Tracker):
        def log(self, step, values):
            raise OSError("no space left on device")

    tracker = FanOut([Breaks(), Jsonl()])
    tracker.open(tmp_path, {}, {})
    tracker.log(1, {"a": 1.0})
    tracker.log(2, {"a": 2.0})
    tracker.close("finished")
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert [record.message.count("no space left") for record in caplog.records] == [1]
