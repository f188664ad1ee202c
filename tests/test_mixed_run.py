"""Whole runs on other mixtures, without duplicates, and on rows that cut samples; what cannot be is refused
before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mft.config.compose import compose_resolved
from mft.config.validate import check
from mft.errors import UserError
from tests.tiny_runs import logged, train, two_tasks, write_task


def write_texts(folder: Path, rows: int) -> Path:
    """A task of plain text, 1 to 150 words each."""
    folder.mkdir(parents=True)
    lines = (json.dumps({"text": f"{folder.name} " + "word " * (i * 37 % 150)}) for i in range(rows))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def own_yaml(tmp_path: Path, name: str, share: float) -> str:
    """A task's yaml of the user's own, of a folder of 40 rows."""
    folder = write_task(tmp_path / "tasks" / name, 40)
    (tmp_path / "task").mkdir(exist_ok=True)
    text = f"# @package task.{name}\n_target_: mft.data.task.Task\npaths: [{folder}]\nshare: {share}\n"
    (tmp_path / "task" / f"{name}.yaml").write_text(text)
    return name


def test_a_run_by_shares_reaches_them_and_says_so_before(tmp_path: Path, cache_dir: Path) -> None:
    by_temperature = ["data.mixture=temperature", "data.mixture_temperature=1e9"]
    seldom = ["train.max_steps=12", "train.eval_every=null", "train.save_every=null"]
    summary, run_dir = train(tmp_path, cache_dir, *by_temperature, *seldom, "train.per_device_batch_size=4")
    said = json.loads((run_dir / "report" / "mixture.json").read_text())
    assert said["adding"]["natural_share"] > 0.65 and abs(said["adding"]["share"] - 0.5) < 0.03
    assert said["naming"]["epochs"] > 1.5 * said["adding"]["epochs"]
    rows = logged(run_dir)
    trained = {name: sum(row.get(f"train/samples/{name}", 0) for row in rows) for name in said}
    assert abs(trained["adding"] / sum(trained.values()) - 0.5) < 0.06
    assert summary["status"] == "finished"


def test_shares_of_the_users_tasks_compose_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    names = f"task=[{own_yaml(tmp_path, 'left', 3)},{own_yaml(tmp_path, 'right', 1)}]"

    def checked(*overrides: str) -> None:
        check(
            compose_resolved(["model=tiny", f"cache_dir={tmp_path}", names, *overrides], [tmp_path]), world=1
        )

    checked("data.mixture=shares")
    with pytest.raises(UserError, match=r"task\.left\.share=3 does nothing with data\.mixture=natural"):
        checked()
    with pytest.raises(UserError, match=r"task\.left\.share=-1.* must be at least 0"):
        checked("data.mixture=shares", "task.left.share=-1")
    with pytest.raises(UserError, match=r"data\.mixture_temperature=0\.0 must be"):
        checked("data.mixture_temperature=0")


def test_duplicates_are_dropped_from_a_run(tmp_path: Path, cache_dir: Path) -> None:
    folder = write_task(tmp_path / "twice", 40)
    file = folder / "rows.jsonl"
    file.write_text(file.read_text() * 2)
    _, run_dir = train(
        tmp_path, cache_dir, f"data.paths=[{folder}]", "data.duplicates=drop", "train.max_steps=1"
    )
    said = json.loads((run_dir / "report" / "data.json").read_text())["twice"]
    assert said["duplicates"] == {"repeated": 40, "held out": 0}
    assert (said["rows"], said["kept"], said["dropped"]["repeated"]) == (80, 40, 40)
    assert len((run_dir / "report" / "dropped.jsonl").read_text().splitlines()) == 40


def test_pretraining_on_rows_that_cut_samples(tmp_path: Path, cache_dir: Path) -> None:
    paths = f"data.paths=[{write_texts(tmp_path / 'books', 60)},{write_texts(tmp_path / 'code', 30)}]"
    summary, run_dir = train(
        tmp_path, cache_dir, "data=concat", paths, "optimizer.lr=1e-2", "train.max_steps=6"
    )
    assert summary["last"]["valid/loss"] < summary["first"]["valid/loss"]
    fills = [row["data/fill"] for row in logged(run_dir) if "data/fill" in row]
    assert min(fills) == 1.0
    said = json.loads((run_dir / "report" / "data.json").read_text())["books"]
    assert said["rows"] == said["kept"] == 60 and said["length"]["max"] > 128


@pytest.mark.parametrize("loss", ["sample_mean", "task_sample_mean", "sample_focal", "task_focal"])
def test_losses_that_count_samples_refuse_rows_that_cut_them(tmp_path: Path, loss: str) -> None:
    given = [
        "model=tiny",
        f"cache_dir={tmp_path}",
        two_tasks(tmp_path / "tasks"),
        "data=concat",
        f"loss={loss}",
    ]
    with pytest.raises(UserError, match=r"counts whole samples, but the rows of data=concat cut them"):
        check(compose_resolved(given), world=1)


def test_what_does_not_go_together_with_cutting_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(
        UserError, match=r"task\.adding: its rows are conversations \(chat\), which data=concat"
    ):
        train(tmp_path, cache_dir, "data=concat")
    given = ["model=tiny", f"cache_dir={tmp_path}", two_tasks(tmp_path / "tasks"), "data.long_samples=keep"]
    with pytest.raises(UserError, match=r"data\.long_samples=keep is for rows that cut samples"):
        check(compose_resolved(given), world=1)


def test_the_report_says_why_no_sample_is_left(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(UserError, match=r"data\.split: no sample is left for training"):
        train(tmp_path, cache_dir, "data.split=[0,100,0]")
    report = tmp_path / "run" / "report"
    assert json.loads((report / "data.json").read_text())["adding"]["kept"] > 0
    assert (report / "dropped.jsonl").exists()
