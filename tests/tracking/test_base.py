"""The log every run keeps, and several trackers at once."""

import json
import math
import subprocess

import pytest

from mft.errors import UserError
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


def test_a_run_that_begins_anew_begins_a_new_file(tmp_path):
    first = Jsonl()
    first.open(tmp_path, {}, {})
    first.log(0, {"valid/loss": 3.0})
    again = Jsonl()
    again.open(tmp_path, {}, {}, step=0)
    again.log(0, {"valid/loss": 3.0})
    assert lines(tmp_path) == [{"step": 0, "valid/loss": 3.0}]


def test_lines_that_are_no_rows_are_left_out_on_resume(tmp_path):
    rows = b'{"step": 1}\nnull\n[1]\n7\n{"step": null}\n{"step": "1"}\n\xff\xfe\n{"step": 2}\n{"step"'
    (tmp_path / "metrics.jsonl").write_bytes(rows)
    Jsonl().open(tmp_path, {}, {}, step=5)
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]


def test_rows_that_find_a_full_disk_are_written_when_there_is_room(tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", disk], capture_output=True, timeout=300
    ).returncode:
        pytest.skip("a disk may be mounted by root only")
    try:
        tracker = FanOut([Jsonl()])
        tracker.open(disk, {}, {})
        tracker.log(1, {"a": 1.0})
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(1024))
        for step in range(2, 200):
            tracker.log(step, {"a": 1.0, "b": 2.0})
        steps = [row["step"] for row in lines(disk)]  # whole lines only
        assert steps == list(range(1, len(steps) + 1)) and len(steps) < 199
        (disk / "filler").unlink()
        tracker.close("finished")
        assert [row["step"] for row in lines(disk)] == list(range(1, 200))
        assert len(caplog.records) == 1 and "No space left" in caplog.text
    finally:
        subprocess.run(["umount", disk], check=True, timeout=300)


def test_a_tracker_that_cannot_be_opened_stops_nobody_unless_it_is_a_mistake(tmp_path, caplog):
    class Breaks(Tracker):
        error: Exception = ValueError("its file is damaged")

        def open(self, run_dir, config, tags, step=0):
            raise self.error

    tracker = FanOut([Breaks(), Jsonl()])
    tracker.open(tmp_path, {}, {})
    tracker.log(1, {"a": 1.0})
    assert (
        lines(tmp_path) == [{"step": 1, "a": 1.0}]
        and "its file is damaged. Training continues" in caplog.text
    )
    Breaks.error = UserError("the package is not installed")
    with pytest.raises(UserError, match="not installed"):
        FanOut([Jsonl(), Breaks()]).open(tmp_path, {}, {})
