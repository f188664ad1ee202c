"""What tells settings apart in a comparison: tasks, data, base, adapter."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from mft import cli
from mft.config.compose import compose_resolved
from mft.config.schema import freeze
from mft.files.json_file import write_json
from mft.launch import job
from tests.tiny_runs import write_task


class Runs:
    """Run folders that were checked as runs are, and whose metrics are made up."""

    def __init__(self, root: Path, cache: Path):
        self.root, self.cache = root, cache

    def leave(
        self, name: str, *overrides: str, config: Path | None = None, loss: float = 1.0, **metrics: float
    ) -> None:
        folder = self.root / "runs" / name
        given = ["model=tiny", f"cache_dir={self.cache}", "tracking=none", "launch=inline", *overrides]
        cfg = compose_resolved([*given, f"output_dir={folder}"], [config] if config else [])
        current = job.checked(cfg, given)
        freeze(current.cfg, folder / "config.yaml")
        write_json(folder / "identity.json", current.identity.as_json())
        write_json(folder / "overrides.json", current.describe())
        row = {"step": 1} | {f"valid/loss/{task}": loss for task in current.identity.tasks}
        (folder / "metrics.jsonl").write_text(
            json.dumps(row) + "\n" + json.dumps({"step": 2, **metrics}) + "\n"
        )
        write_json(folder / "summary.json", {"status": "finished"})


@pytest.fixture
def runs(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    for name in ("x", "y"):
        write_task(tmp_path / name, 6)
    monkeypatch.chdir(tmp_path)
    return Runs(tmp_path, cache_dir)


def compared(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[list[list[str]], str]:
    """Returns the rows of the table, its head first, and all that was printed."""
    cli.main(["compare", "runs", "--csv", "table.csv", "--out", "report.html", *args])
    with Path("table.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file)), capsys.readouterr().out


def test_other_data_is_another_setting_with_a_readable_label(runs: Runs, capsys) -> None:
    for seed in (1, 2):
        for name in ("x", "y"):
            runs.leave(f"{name}{seed}", f"data.paths=[{name}]", f"train.seed={seed}")
    table, said = compared(capsys)
    assert "4 runs, 2 settings" in said
    assert table[0][1] == "data.paths" and {row[1] for row in table[1:]} == {"[x]", "[y]"}
    assert "No task was validated by all runs: choose one with --metric TASK" in said


def test_other_task_sets_and_orders_are_other_settings(runs: Runs, capsys) -> None:
    task = "# @package task.NAME\ndefaults:\n  - /format@format: auto\n_target_: mft.data.task.Task\npaths: [PATH]\n"
    (runs.root / "cfg" / "task").mkdir(parents=True)
    for name in ("x", "y"):
        text = task.replace("NAME", name).replace("PATH", str(runs.root / name))
        (runs.root / "cfg" / "task" / f"{name}.yaml").write_text(text)

    runs.leave("both", "task=[x,y]", config=runs.root / "cfg")
    runs.leave("one", "task=[x]", config=runs.root / "cfg")
    table, said = compared(capsys)
    assert "2 runs, 2 settings" in said
    assert table[0][1:3] == ["task", "n"] and {row[1] for row in table[1:]} == {"[x,y]", "[x]"}
    runs.leave("turned", "task=[y,x]", config=runs.root / "cfg")
    table, said = compared(capsys)
    assert "3 runs, 3 settings" in said and "[y,x]" in {row[1] for row in table[1:]}


def test_data_that_changed_between_runs_is_told_by_its_fingerprint(runs: Runs, capsys) -> None:
    runs.leave("before", "data.paths=[x]", "train.seed=1")
    write_task(runs.root / "x", 9, seed=5)
    runs.leave("after", "data.paths=[x]", "train.seed=2")
    table, said = compared(capsys)
    assert "2 runs, 2 settings" in said and table[0][1] == "data fingerprint"
    runs.leave("other", "data.paths=[y]", "train.seed=2")
    table, said = compared(capsys)
    assert "3 runs, 3 settings" in said and table[0][1:3] == ["data.paths", "data fingerprint"]


def test_equal_contents_in_other_places_are_seeds_of_one_setting(runs: Runs, capsys) -> None:
    shutil.copytree(runs.root / "x", runs.root / "elsewhere" / "x")
    runs.leave("here", "data.paths=[x]", "train.seed=1")
    runs.leave("there", "data.paths=[elsewhere/x]", "train.seed=2")
    assert "2 runs, 1 setting" in compared(capsys)[1]


def test_a_retrained_adapter_is_another_setting(runs: Runs, capsys) -> None:
    adapter = runs.root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for number, weights in enumerate(("one", "two")):
        (adapter / "adapter_model.safetensors").write_text(weights)
        runs.leave(f"a{number}", "data.paths=[x]", f"peft.path={adapter}", f"train.seed={number}")
    table, said = compared(capsys)
    assert "2 runs, 2 settings" in said and table[0][1] == "adapter fingerprint"
    runs.leave("none", "data.paths=[x]", "train.seed=3")
    table, _ = compared(capsys)
    assert table[0][1:3] == ["peft.path", "adapter fingerprint"] and len(table) == 4


def test_settings_of_a_model_made_in_code_say_which_one_it_is(runs: Runs, capsys) -> None:
    for layers in (1, 2):
        runs.leave(f"{layers}", "data.paths=[x]", f"model.layers={layers}")
    table, _ = compared(capsys)
    assert table[0][1:3] == ["model.layers", "n"]


def test_the_highest_value_wins_where_higher_is_better(runs: Runs, capsys) -> None:
    for seed in (1, 2):
        few, many = {"eval/accuracy": 0.1 + seed / 1000}, {"eval/accuracy": 0.9 + seed**2 / 1000}
        runs.leave(f"bad{seed}", "data.paths=[x]", f"train.seed={seed}", loss=1.0, **few)
        runs.leave(
            f"good{seed}", "data.paths=[x]", f"train.seed={seed}", "optimizer.lr=0.5", loss=2.0, **many
        )
    table, said = compared(capsys, "--metric", "eval/accuracy")
    assert [row[1] for row in table[1:]] == ["0.5", "null"] and [row[-1] for row in table[1:]] == [
        "highest",
        "lower",
    ]
    assert "optimizer.lr=0.5 is higher than all others" in said
    assert "highest eval/accuracy" in Path("report.html").read_text()
    table, _ = compared(capsys, "--metric", "eval/accuracy", "--better", "lower")
    assert [row[1] for row in table[1:]] == ["null", "0.5"]
    table, said = compared(capsys)
    assert [row[1] for row in table[1:]] == ["null", "0.5"] and "is lower than all others" in said
    with pytest.raises(SystemExit):
        compared(capsys, "--metric", "eval/accuracy", "--better", "best")
    assert "--better needs one of lower, higher, got 'best'" in capsys.readouterr().err
