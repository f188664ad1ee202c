"""One run from end to end: what it leaves behind, exact resume, longer runs, early stop, what a person is
told."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mft import run_folder
from mft.errors import UserError
from mft.files.json_file import read_json
from mft.launch import launch
from mft.training import checkpoint
from mft.training.checkpoint import COMPLETE, Checkpoints, complete_steps
from mft.training.validate import Evaluator
from tests.selection import long
from tests.tiny_runs import logged, stopped_after, train, two_tasks, write_task

pytestmark = pytest.mark.slow


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / name)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_run_folder_holds_what_it_promises(tmp_path: Path, cache_dir: Path) -> None:
    summary, run_dir = train(tmp_path, cache_dir, pictures=True)
    names = (
        "config.yaml",
        "identity.json",
        "metrics.jsonl",
        "summary.json",
        "report/data.json",
        "report/losses.png",
    )
    for name in names:
        assert (run_dir / name).is_file(), name
    assert (run_dir / "checkpoints" / "step-3" / COMPLETE).is_file()
    assert (run_dir / "final" / "adapter_config.json").is_file()
    assert summary["status"] == "finished" and summary["steps"] == 3
    assert set(summary["last"]) == {"valid/loss", "valid/loss/adding", "valid/loss/naming"}
    assert summary["last"]["valid/loss"] == pytest.approx(
        (summary["last"]["valid/loss/adding"] + summary["last"]["valid/loss/naming"]) / 2
    )
    steps = [row for row in logged(run_dir) if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert {"lr", "grad_norm", "epoch", "train/loss"} <= set(steps[0])


@pytest.mark.parametrize(
    ("peft", "data"),
    [
        long("full", "pad"),
        ("lora", "pack"),
        long("qlora", "pad"),
        long("full", "pack"),
        long("lora", "pad"),
        long("qlora", "pack"),
    ],
)
def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(
    peft: str, data: str, tmp_path: Path, cache_dir: Path
) -> None:
    settings = [
        f"peft={peft}",
        f"data={data}",
        "train.max_steps=7",
        "train.save_every=3",
        "train.eval_every=2",
    ]
    settings += ["optimizer.lr=1e-3", "train.gradient_accumulation_steps=2"]
    settings += ["peft.dropout=0.1"] if peft != "full" else []
    _, whole = train(tmp_path, cache_dir, *settings, out="whole")

    with stopped_after(4):
        summary, parts = train(tmp_path, cache_dir, *settings, out="parts")
    assert summary["status"] == "stopped" and complete_steps(parts / "checkpoints")[-1] == 4
    summary, _ = train(tmp_path, cache_dir, *settings, out="parts")
    assert summary["status"] == "finished" and summary["steps"] == 7

    assert same(weights(whole / "final"), weights(parts / "final"))
    # the interrupted run logs at the step it stops, too; from then on the two logs are equal
    assert [r for r in logged(whole) if r["step"] > 4] == [r for r in logged(parts) if r["step"] > 4]


def test_the_time_of_a_step_is_without_validating_and_saving(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, validation = Checkpoints.save, Evaluator.by_name

    def slow_save(self, state):
        time.sleep(2)
        return save(self, state)

    def slow_validation(self, *arguments):
        time.sleep(2)
        return validation(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", slow_save)
    monkeypatch.setattr(Evaluator, "by_name", slow_validation)
    _, run_dir = train(tmp_path, cache_dir, "train.max_steps=2", "train.save_every=1", "train.eval_every=1")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["speed/seconds_per_step"] for row in rows if "train/loss" in row]
    assert len(steps) == 2 and max(steps) < 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system with the options given: its size, or how many files it takes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], timeout=300).returncode:
            pytest.skip("a disk may be mounted by root only")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True, timeout=300)


def test_a_disk_without_room_is_told_of_before_a_checkpoint_is_written(
    disk: Callable[[str], Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, begun = disk("size=4m") / "run", []
    written = checkpoint.written
    monkeypatch.setattr(
        checkpoint, "written", lambda folder, *rest: begun.append(folder) or written(folder, *rest)
    )
    told = r"no room for the checkpoint, which takes ([\d.]+) MiB \(([\d.]+) MiB are free\)"
    with pytest.raises(
        UserError, match=rf"{told}.* checkpoints older than step-\d: .*train\.save_state=last"
    ) as error:
        train(run.parent, cache_dir, "peft=full", "train.save_every=1", "train.keep=9")
    steps = complete_steps(run / "checkpoints")
    assert [folder.name for folder in begun] == [f"step-{step}" for step in steps] != []
    needed, free = map(float, re.search(told, str(error.value)).groups())  # type: ignore[union-attr]
    newest = [path for path in (run / "checkpoints" / f"step-{steps[-1]}").rglob("*") if path.is_file()]
    taken = sum(path.stat().st_size for path in newest) / 2**20
    assert free < needed < taken < needed + 0.2, "small files are not counted"
    assert not list((run / "checkpoints").glob(".step*"))
    assert "has no room" in (run / "summary.json").read_text()


def test_a_disk_that_no_checkpoint_fits_on_is_told_of_before_training(
    disk: Callable[[str], Path], cache_dir: Path
) -> None:
    run = disk("size=640k") / "run"
    with pytest.raises(UserError, match=r"no room for the checkpoint.* Make room\.$"):
        train(run.parent, cache_dir, "peft=full")
    assert not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()


def test_a_checkpoint_that_ends_in_a_full_disk_leaves_the_older_one(
    disk: Callable[[str], Path], cache_dir: Path
) -> None:
    """As a quota would: there is room, but no file more is taken."""
    run = disk("size=64m,nr_inodes=90") / "run"
    with pytest.raises(
        UserError, match=r"The disk is full: .*\.step-\d\.tmp could not .* checkpoints older than step-\d: "
    ):
        train(run.parent, cache_dir, "train.max_steps=9", "train.save_every=1", "train.keep=9")
    assert complete_steps(run / "checkpoints") and not list((run / "checkpoints").glob(".step*"))
    assert "The disk is full" in (run / "summary.json").read_text()


def test_finished_run_is_skipped_and_a_longer_one_goes_on(tmp_path: Path, cache_dir: Path) -> None:
    first, run_dir = train(tmp_path, cache_dir)
    metrics = (run_dir / "metrics.jsonl").stat().st_mtime_ns
    again, _ = train(tmp_path, cache_dir)
    assert again == first and (run_dir / "metrics.jsonl").stat().st_mtime_ns == metrics
    longer, _ = train(tmp_path, cache_dir, "train.max_steps=5")
    assert longer["steps"] == 5
    assert [row["step"] for row in logged(run_dir) if "train/loss" in row] == [1, 2, 3, 4, 5]


def test_a_longer_run_that_was_killed_is_not_finished(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder still holds the summary of the shorter one, and the length of the longer one."""
    _, run_dir = train(tmp_path, cache_dir)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(launch, "_run_ranks", killed)
        train(tmp_path, cache_dir, "train.max_steps=5")
    assert run_folder.state(run_dir) == "killed" and read_json(run_dir / "summary.json")["last"]
    again, _ = train(tmp_path, cache_dir, "train.max_steps=5")
    assert again["steps"] == 5 and again["status"] == "finished"


def test_folder_of_another_config_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    train(tmp_path, cache_dir)
    with pytest.raises(UserError, match="another config"):
        train(tmp_path, cache_dir, "optimizer.lr=3e-3")
    with pytest.raises(UserError, match=r"train\.resume=never"):
        train(tmp_path, cache_dir, "train.resume=never")
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train(tmp_path, cache_dir, out="other")


def test_a_run_that_stalled_and_is_extended_trains_to_its_next_validation(
    tmp_path: Path, cache_dir: Path
) -> None:
    given = ("optimizer.lr=30.0", "scheduler=constant", "train.eval_every=2", "train.save_every=2")
    given += ("train.early_stopping=true", "train.early_stopping_stall_num=2")
    first, _ = train(tmp_path, cache_dir, *given, "train.max_steps=12")
    assert first["status"] == "finished" and first["steps"] < 12
    further, _ = train(tmp_path, cache_dir, *given, "train.max_steps=14")
    assert further["steps"] >= first["steps"] + 2


def test_what_cannot_change_the_result_keeps_the_identity(tmp_path: Path, cache_dir: Path) -> None:
    first, _ = train(tmp_path, cache_dir, "train.per_device_batch_size=4")
    again, _ = train(
        tmp_path,
        cache_dir,
        "train.per_device_batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.keep=7",
    )
    assert again == first
    with pytest.raises(UserError, match="another config"):
        train(tmp_path, cache_dir, "train.per_device_batch_size=2")


def test_early_stopping_ends_the_run_and_pruning_keeps_the_best(tmp_path: Path, cache_dir: Path) -> None:
    summary, run_dir = train(
        tmp_path,
        cache_dir,
        "optimizer.lr=30.0",  # diverges at once
        "scheduler=constant",
        "train.max_steps=12",
        "train.eval_every=1",
        "train.save_every=1",
        "train.keep=1",
        "train.early_stopping=true",
        "train.early_stopping_stall_num=3",
    )
    assert summary["status"] == "finished" and summary["steps"] < 12
    kept = complete_steps(run_dir / "checkpoints")
    assert kept[-1] == summary["steps"] and len(kept) <= 2
    assert summary["best"]["valid/loss"] <= summary["last"]["valid/loss"]
    if summary["best"]["step"]:
        assert summary["best"]["step"] in kept


def test_starting_from_an_adapter_goes_on_from_its_weights(tmp_path: Path, cache_dir: Path) -> None:
    _, first = train(tmp_path, cache_dir, "optimizer.lr=1e-2", out="first")
    again, _ = train(tmp_path, cache_dir, f"peft.path={first / 'final'}", "train.max_steps=1", out="second")
    last = json.loads((first / "summary.json").read_text())["last"]["valid/loss"]
    assert again["first"]["valid/loss"] == pytest.approx(last, abs=1e-6)


def test_broken_row_is_told_by_file_and_line_before_any_model_loads(tmp_path: Path, cache_dir: Path) -> None:
    task = write_task(tmp_path / "broken", 5)
    with (task / "rows.jsonl").open("a") as file:
        file.write('{"chat_rounds": [{"role": "human", "content": "x"\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:6: .*JSON"):
        train(tmp_path, cache_dir, f"data.paths=[{task}]")
    summary, run_dir = train(
        tmp_path, cache_dir, f"data.paths=[{task}]", "data.bad_rows=skip", out="skipping"
    )
    assert summary["status"] == "finished"
    assert json.loads((run_dir / "report" / "data.json").read_text())["broken"]["dropped"]["bad row"] == 1


def test_exploding_run_stops_with_the_step_and_the_samples_named(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(UserError, match=r"Step \d+ has a non-finite.*optimizer.lr"):
        train(
            tmp_path,
            cache_dir,
            "optimizer.lr=1e30",
            "scheduler=constant",
            "peft=full",
            "train.max_grad_norm=null",
        )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "non-finite" in summary["error"]


def test_answers_before_and_after_are_kept_side_by_side(tmp_path: Path, cache_dir: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": "human", "content": "what comes next?"}, {"role": "bot", "content": "it is 3"}]
    prompts.write_text(json.dumps({"data_name": "adding", "chat_rounds": turns}) + "\n")
    _, run_dir = train(tmp_path, cache_dir, f"train.prompts={prompts}", "train.prompts_max_new_tokens=4")
    text = (run_dir / "report" / "answers.md").read_text()
    assert "**before**" in text and "**after**" in text and "it is 3" in text
    (row,) = json.loads((run_dir / "report" / "answers.json").read_text())["data"]
    assert (row[0], *row[3:]) == ("what comes next?", "it is 3", "adding")


def test_same_seed_same_loss_other_seed_other_loss(tmp_path: Path, cache_dir: Path) -> None:
    runs = [
        train(tmp_path, cache_dir, f"train.seed={seed}", out=f"{n}")[1] for n, seed in enumerate((1, 1, 2))
    ]
    first, again, other = ([r.get("train/loss") for r in logged(folder)] for folder in runs)
    assert first == again != other


def test_two_tasks_helper_names_both(tmp_path: Path) -> None:
    assert "adding" in two_tasks(tmp_path) and "naming" in two_tasks(tmp_path)
