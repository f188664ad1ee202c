"""Event files, read back with TensorBoard's own reader."""

import sys

import pytest

from mft.errors import UserError
from mft.tracking.tensorboard import TensorBoard


def points(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_resume_leaves_each_step_once(tmp_path):
    first = TensorBoard()
    first.open(tmp_path, {"lr": 1.0}, {"uri": "http://me:secret@host"})
    for step in (1, 2, 3):
        first.log(step, {"valid/loss/a": step / 10})
    first.writer.flush()  # and killed: never closed
    again = TensorBoard()
    again.open(tmp_path, {"lr": 1.0}, {}, step=2)
    again.log(3, {"valid/loss/a": 0.9})
    again.close("finished")
    assert points(tmp_path / "tensorboard", "valid/loss/a") == [(1, 0.1), (2, 0.2), (3, 0.9)]
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert again.where() == f"tensorboard --logdir {tmp_path / 'tensorboard'}"


def test_a_shared_folder_gets_a_folder_a_run(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        tracker = TensorBoard(dir=str(tmp_path / "shared"))
        tracker.open(tmp_path / run, {}, {})
        tracker.log(1, {"x": 1.0})
        tracker.close("finished")
        assert points(tmp_path / "shared" / run, "x") == [(1, 1.0)]


def test_missing_package_is_told_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"mft\[tensorboard\]"):
        TensorBoard().open(tmp_path, {}, {})
