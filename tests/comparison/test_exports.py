"""compare.json is documented and plain JSON; tables hold the same numbers, escaped for where they go."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from mft.comparison import compare_json, ranked_table
from mft.comparison.compare import Comparison, compare
from tests.comparison.made_runs import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def comparison() -> Comparison:
    shifts = {"coba": -0.05, "a|b & 50% $x_1$": 0.0}
    noise = {1: 0.1, 2: 0.2, 3: 0.15}
    return compare(
        [
            run({"x": 1 + shift + more + shift * more / 50, "y": 2 + more}, seed, loss=loss)
            for loss, shift in shifts.items()
            for seed, more in noise.items()
        ],
        "here",
        ["mean", "worst"],
    )


def test_every_field_of_compare_json_is_documented(comparison: Comparison, tmp_path: Path) -> None:
    path = compare_json.write(comparison, tmp_path / "compare.json")

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs/comparison.md").read_text()))
    (run, *_), (setting, other) = content["runs"], content["settings"]
    for part in (content, content["metrics"][0], content["effects"][0], content["effects"][0]["levels"][0]):
        assert part.keys() <= documented
    for part in (run, setting, other["difference"], other["by_task"]["x"]):
        assert part.keys() <= documented, part.keys() - documented
    assert content["format"] == "mft-compare" and content["winner"] == "loss=coba"
    assert setting["difference"] is None and other["difference"]["told_apart"] is True
    assert setting["seeds"]["mean"] == pytest.approx({"1": 1.57495, "2": 1.6749, "3": 1.624925})


def test_the_csv_has_plain_numbers(comparison: Comparison, tmp_path: Path) -> None:
    ranked_table.write_csv(comparison, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["loss"] == "coba" and first["verdict"] == "lowest" and first["difference"] == ""
    assert float(second["mean"]) - float(first["mean"]) == pytest.approx(float(second["difference"]))
    assert float(second["low"]) < float(second["difference"]) < float(second["high"])
    assert float(second["x difference"]) == pytest.approx(0.05, abs=0.001) and float(second["y"]) == 2.15


def test_tables_for_papers_are_escaped(comparison: Comparison, tmp_path: Path) -> None:
    for kind, name in (("markdown", "t.md"), ("latex", "t.tex")):
        ranked_table.write_paper_table(comparison, tmp_path / name, kind)
    markdown = (tmp_path / "t.md").read_text().splitlines()
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in markdown]
    assert len(set(columns)) == 1 and r"a\|b & 50% $x_1$" in markdown[3]
    latex = (tmp_path / "t.tex").read_text()
    assert r"\toprule" in latex and r"a|b \& 50\% \$x\_1\$" in latex


def test_names_run_nothing_where_a_table_is_opened(tmp_path: Path) -> None:
    names = {"=1+1": "'=1+1", "@x": "'@x", "-2+3": "'-2+3", "-2e-3": "-2e-3", "+.5": "+.5", "-": "-"}
    result = compare([run({"=t()": 1.0}, loss=name) for name in names], "here")
    ranked_table.write_csv(result, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert {line["loss"] for line in lines} == set(names.values())
    assert "'=t()" in lines[0] and float(lines[1]["difference"]) == 0
    result = compare(
        [run({"<b>": 1.0}, loss=name) for name in ("<img src=x>", "`a` *b* c_d", "[x](y)")], "here"
    )
    ranked_table.write_paper_table(result, tmp_path / "t.md", "markdown")
    text = (tmp_path / "t.md").read_text()
    assert all(name in text for name in (r"\<b>", r"\<img src=x>", r"\`a\` \*b\* c_d", r"[x]\(y)"))


def test_the_terminal_has_a_row_for_the_model_before_training(comparison: Comparison) -> None:
    head, rows = ranked_table.text_table(comparison, 1)
    assert head == ["rank", "loss", "n", "mean", "worst", "difference", "p", "x", "seconds", "verdict"]
    assert [len(row) for row in rows] == [len(head)] * 3
    assert rows[2][1] == "before training" and rows[2][3] == "4.0000" and rows[1][-1] == "higher"
    assert re.fullmatch(r"\+0\.02\d\d \[\+0\.02\d\d, \+0\.02\d\d\]", rows[1][5])


def test_a_baseline_of_single_task_runs_is_in_the_json_as_well() -> None:
    runs = [run({task: 1.0 + seed}, seed, task=f"[{task}]") for task in "ab" for seed in (1, 2)]
    runs += [run({"a": 0.9, "b": 2.2 + seed}, seed, task="[a,b]") for seed in (1, 2)]
    content = compare_json.content(compare(runs, "here"))
    single = content["single_tasks"]
    assert len(content["runs"]) == 6 and single["mean"] == {"mean": 2.5} and single["seconds"] == 20.0
    assert single["losses"] == {"a": 2.5, "b": 2.5}


def test_the_row_before_training_has_every_loss_that_is_asked_for() -> None:
    runs = [run({"x": 1.0, "y": 2.0}, seed, loss=loss) for loss in "ab" for seed in (1, 2)]
    runs[0].rows[0]["valid/loss/y"] = 5.0
    head, rows = ranked_table.text_table(compare(runs, "here", ["y", "worst", "mean"]))
    assert (
        dict(zip(head, rows[-1], strict=True)).items()
        >= {"y": "4.2500", "worst": "4.2500", "x": "4.0000"}.items()
    )


def test_a_narrow_terminal_shows_names_and_differences_before_other_numbers(comparison: Comparison) -> None:
    wide = ranked_table.fitted_table(comparison, 200)
    assert wide.columns == ranked_table.text_table(comparison)[0] and not wide.left_out
    narrow = ranked_table.fitted_table(comparison, 80)
    assert narrow.whole_words and narrow.columns[1:3] == ["loss", "n"] and "difference" in narrow.columns
    assert narrow.left_out[:2] == ["seconds", "y"]
    keys = {f"key_of_a_long_name_{number}": "some_value" for number in range(4)}
    runs = [run({"x": loss}, loss=str(loss), **{k: f"{v}{loss}" for k, v in keys.items()}) for loss in (1, 2)]
    names = ranked_table.fitted_table(compare(runs, "here"), 80)
    assert names.columns[:2] == ["rank", "setting"] and names.whole_words
