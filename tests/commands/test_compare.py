"""`mft compare` on a real small sweep: table, flags, report."""

from __future__ import annotations

import csv
import html
import json
import os
from pathlib import Path

import pytest

from mft import cli
from mft.tracking import store


@pytest.fixture
def here(swept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(swept)
    return swept


def compare(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    cli.main(["compare", *args])
    return capsys.readouterr().out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_flags(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "r.html"), f"--csv={tmp_path / 't.csv'}"]
    out += ["--markdown", str(tmp_path / "t.md"), "--latex", str(tmp_path / "t.tex")]
    said = compare(capsys, "multirun/small", *out)
    assert "4 runs, 2 settings" in said and "No winner: one more is not told apart" in said
    assert "cover the choice of seeds and of validation rows" in said
    table = rows(tmp_path / "t.csv")
    assert [row["n"] for row in table] == ["2", "2"] and {row["loss"] for row in table} == {
        "task_token_mean",
        "coba",
    }
    assert float(table[0]["mean"]) <= float(table[1]["mean"]) and table[0]["verdict"] == "lowest"
    content = json.loads((tmp_path / "compare.json").read_text())
    assert [setting["rank"] for setting in content["settings"]] == [1, 2] and content["winner"] is None
    assert content["settings"][1]["difference"]["rows"] > 4, "losses of single rows were read"
    assert "\\toprule" in (tmp_path / "t.tex").read_text() and "| verdict" in (tmp_path / "t.md").read_text()
    compare(
        capsys, "multirun/small", *out, "--metric", "docs,speed/tokens_per_second", "--group-by", "train.seed"
    )
    table = rows(tmp_path / "t.csv")
    assert {row["train.seed"] for row in table} == {"1", "2"} and all(row["n"] == "2" for row in table)
    assert float(table[0]["speed/tokens_per_second"]) > 0
    assert "docs" in (tmp_path / "r.html").read_text()
    said = compare(capsys, "multirun/small", *out, "--baseline", "loss=task_token_mean")
    assert "than the baseline" in said or "from the baseline (loss=task_token_mean)" in said


def test_results_of_other_tools_are_metrics(here: Path, tmp_path: Path, capsys) -> None:
    runs = sorted(here.glob("multirun/small/*/*/identity.json"))
    given = []
    for number, run in enumerate(runs):
        results = {"results": {"hellaswag": {"acc,none": 0.3 + number / 100, "acc_stderr,none": 0.01}}}
        results["config"] = {"model_args": f"pretrained=base,peft={run.parent}/final"}
        (tmp_path / f"{number}.json").write_text(json.dumps(results))
        given += ["--with", str(tmp_path / f"{number}.json")]
    out = ["--out", str(tmp_path / "r.html"), f"--csv={tmp_path / 't.csv'}"]
    compare(capsys, "multirun/small", *given, "--metric", "hellaswag/acc,mean", *out)
    table = rows(tmp_path / "t.csv")
    assert float(table[0]["hellaswag/acc"]) > float(table[1]["hellaswag/acc"]), "the highest first"


def test_an_mlflow_experiment_by_name_gives_the_same_table(here: Path, tmp_path: Path, capsys) -> None:
    tables = []
    for source in (["multirun/small"], ["small"], ["small", "--uri", f"sqlite:///{here}/mlflow.db"]):
        compare(capsys, *source, "--out", str(tmp_path / "r.html"), "--csv", str(tmp_path / "t.csv"))
        keys = ("loss", "n", "mean", "spread", "worst", "docs", "code")
        tables.append(sorted(tuple(row[key] for key in keys) for row in rows(tmp_path / "t.csv")))
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--metrik", "mean"], ["--metrik", "did you mean --metric?"]),
        (["multirun/small", "--metric", "wurst"], ["--metric wurst", "did you mean worst?"]),
        (["multirun/small", "--group-by", "los"], ["--group-by los", "did you mean loss?"]),
        (["multirun/small", "--csv"], ["--csv needs a file"]),
        (["multirun/small", "--baseline", "loss=cobra"], ["--baseline loss=cobra", "did you mean coba?"]),
        (["multirun/small", "--metric", "lr"], ["--metric lr", "add --better lower, or --higher"]),
        (["multirun/small", "--with", "nothing.json"], ["--with nothing.json"]),
        (["multirun/smal"], ["neither a folder nor an experiment", "did you mean multirun/small?"]),
        (["multirun/small", "--higher", "--better", "lower"], ["contradict each other"]),
        (["multirun/small", "--baseline", "coba"], ["expected KEY=VALUE; did you mean loss=coba?"]),
        (["multirun/small", "--csv", "/proc/t.csv"], ["--csv: /proc/t.csv cannot be written: No such file"]),
        (["multirun/small", "--latex", "multirun"], ["--latex: multirun cannot be written: Is a directory"]),
        (["multirun/small", "--out", "/proc/r.html"], ["--out: /proc/r.html cannot be written"]),
        (["smal"], ["neither a folder nor an experiment", "did you mean small?"]),
        ([str(Path(__file__).parents[1] / "data")], ["There is no run"]),
    ],
)
def test_a_mistake_gets_a_sentence(here: Path, args: list[str], parts: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["compare", *args])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and all(part in said for part in parts), said


def test_the_sweep_leaves_its_report(here: Path) -> None:
    (report,) = here.glob("multirun/small/*/report.html")
    text = report.read_text()
    assert text.count("<svg") >= 4 and text.count("<script") == 1, "pictures, and what sorts the table"
    assert "http://" not in text and "https://" not in text
    assert text.count("mft train debug=fast") == 4, "a command for every run"
    content = json.loads((report.parent / "compare.json").read_text())
    assert len(content["runs"]) == 4 and all(run["command"] in html.unescape(text) for run in content["runs"])
    assert os.path.getsize(report) < 3e6


def test_all_pages_of_an_experiment_are_read(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(store, "PAGE", 1)
    assert "4 runs, 2 settings" in compare(capsys, "small", "--out", str(tmp_path / "r.html"))


def test_a_metric_of_an_experiment_is_compared_by_its_own_name(here: Path, tmp_path: Path, capsys) -> None:
    """MLflow knows it by another one where it has an @."""
    from mft.tracking.store import client_for

    client = client_for(f"sqlite:///{here}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'small'")
    for number, run in enumerate(client.search_runs([experiment.experiment_id])):
        client.log_metric(run.info.run_id, "pass_at_1", number / 10, step=6)
    compare(
        capsys,
        "small",
        "--metric",
        "pass@1",
        "--out",
        str(tmp_path / "r.html"),
        f"--csv={tmp_path / 't.csv'}",
    )
    table = rows(tmp_path / "t.csv")
    assert float(table[0]["pass@1"]) > float(table[1]["pass@1"]) and len(table) == 2
