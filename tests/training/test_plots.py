"""Pictures of a run: there, readable in number of panels, and nothing drawn from nothing."""

import json
import struct
import sys

import pytest

from mft import run_folder
from mft.training import summary
from mft.training.panels import MOST
from mft.training.plots import length_histogram, loss_curves, task_weights
from mft.training.progress import Terminal


def size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def rows(tasks, steps):
    return [
        {"step": step, "train/loss": 2.0, "valid/loss": None if step == 1 else 2.0}
        | {f"{split}/loss/t{i}": 2.0 / (step + 1) + i for i in range(tasks) for split in ("train", "valid")}
        | {f"train/weight/t{i}": 1.0 for i in range(tasks)}
        for step in range(steps)
    ]


@pytest.mark.parametrize(("tasks", "steps"), [(0, 2), (1, 1), (2, 2), (5, 200), (12, 3)])
def test_losses_and_weights_of_any_number_of_tasks(tmp_path, tasks, steps):
    path = loss_curves(rows(tasks, steps), tmp_path / "report")
    assert path == tmp_path / "report" / "losses.png"
    assert size(path)[0] >= 400
    weights = task_weights(rows(tasks, steps), tmp_path / "report")
    assert weights is None if tasks == 0 else size(weights)


def test_from_the_file_of_a_run_that_was_killed(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(2, 3)) + '{"step": 9, "tr')
    assert loss_curves(run_folder.metric_rows(file)[0], tmp_path).exists()


def test_no_losses_no_picture(tmp_path):
    assert loss_curves([], tmp_path) is None
    assert task_weights([{"step": 1, "lr": 0.1}], tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_length_histogram(tmp_path):
    import numpy as np

    lengths = {"a": np.arange(1, 500), "b": np.array([7]), "empty": np.empty(0, np.int32)}
    picture = length_histogram(lengths, 512, tmp_path / "report")
    assert picture == tmp_path / "report" / "lengths.png" and picture.read_bytes().startswith(b"\x89PNG")


def test_of_many_tasks_the_worst_have_panels_and_the_picture_says_so(tmp_path, monkeypatch):
    import numpy as np

    figures = []
    monkeypatch.setattr("mft.training.plots._save", lambda figure, path: figures.append(figure) or path)
    many = rows(300, 3)
    loss_curves(many, tmp_path)
    task_weights(many, tmp_path)
    length_histogram({f"t{i}": np.arange(1, 2 + i) for i in range(300)}, 512, tmp_path)
    losses, weights, lengths = figures
    titles = [axis.get_title() for axis in losses.axes]
    assert len(titles) == MOST and titles[-1] == "t299" and "t0" not in titles
    assert "22 tasks with the highest last loss of 300" in losses.get_suptitle()
    assert "24 largest of 300" in weights.get_suptitle()
    assert len(lengths.axes) == MOST and lengths.axes[-1].get_title().startswith("277 other tasks: ")


def test_a_line_names_the_worst_of_many_tasks(capsys):
    names = [f"t{i}" for i in range(300)]
    Terminal(names).validated(1, {name: float(i) for i, name in enumerate(names)})
    said = capsys.readouterr().out
    assert "highest: t299 299.000 · t298" in said and "288 more tasks" in said and "t0 " not in said


def test_without_matplotlib_there_is_a_sentence_and_no_picture(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows(2, 1)[0]) + "\n")
    assert "matplotlib cannot be imported" in summary.draw(tmp_path)
    assert not (tmp_path / "report").exists()
