"""`mft data`: the data of a run, looked at and prepared through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mft.cli import main
from mft.data.cache import build
from tests.tiny_runs import train, write_task


@pytest.fixture
def overrides(tmp_path: Path, cache_dir: Path) -> list[str]:
    adding, naming = write_task(tmp_path / "adding", 40), write_task(tmp_path / "naming", 20, longest=3)
    with (naming / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"chat_rounds": [{"role": "human"}]}\n')
    paths = f"data.paths=[{adding},{naming}]"
    return ["debug=fast", paths, f"cache_dir={cache_dir}", "data.limit=null", "data.bad_rows=skip"]


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(["data", *args])
    return capsys.readouterr().out


def test_report(overrides: list[str], tmp_path: Path, capsys) -> None:
    text = said(capsys, "report", *overrides, f"output_dir={tmp_path / 'out'}")
    folder = tmp_path / "out" / "report"
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in text.splitlines()
        if line.startswith("│")
    }
    assert set(rows) == {"adding", "naming", "all"} and "mixture: natural" in text
    numbers = json.loads((folder / "data.json").read_text())
    assert numbers["naming"]["rows"] == 21 and numbers["naming"]["dropped"]["bad row"] == 1
    assert set(numbers["adding"]["length"]) == {"mean", "p50", "p95", "max"}
    mixed = json.loads((folder / "mixture.json").read_text())
    assert sum(task["share"] for task in mixed.values()) == pytest.approx(1, abs=1e-5)
    (dropped,) = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert (dropped["task"], dropped["line"], dropped["field"]) == ("naming", 21, "chat_rounds[0].content")
    assert "1 dropped rows" in text and str(folder / "dropped.jsonl") in text
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_show_marks_what_is_trained(overrides: list[str], tmp_path: Path, capsys) -> None:
    text = said(capsys, "show", *overrides, "--n", "2", "task=naming")
    shown = [line for line in text.splitlines() if line.startswith("naming: ")]
    assert len(shown) == 2 and "adding" not in text
    line = int(shown[0].split("rows.jsonl:")[1].split(":")[0])
    question, answer = json.loads((tmp_path / "naming" / "rows.jsonl").read_text().splitlines()[line - 1])[
        "chat_rounds"
    ]
    assert f"<s>human\n{question['content']}<s>bot\n⟦{answer['content']}<|endoftext|>⟧\n" in text
    assert said(capsys, "show", *overrides, "--n=1").count(" trained\n") == 2


def test_prepare_leaves_nothing_for_the_run_to_tokenise(
    overrides: list[str], tmp_path: Path, capsys, monkeypatch
):
    fresh = f"cache_dir={tmp_path / 'cache'}"
    text = said(capsys, "prepare", *overrides, fresh)
    folders = [Path(line.split(" samples in ")[1]) for line in text.splitlines() if " samples in " in line]
    assert len(folders) == 2 and all((folder / "meta.json").is_file() for folder in folders)
    monkeypatch.setattr(build, "write", lambda *args: pytest.fail("tokenised again"))
    summary, _ = train(tmp_path, tmp_path / "cache", *overrides, fresh)
    assert summary["status"] == "finished"


def test_data_sets_come_beside_files(overrides: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    paths = f"data.paths=['hf:{write_task(tmp_path / 'chatter', 30)}:train','{tmp_path / 'adding'}']"
    text = said(capsys, "prepare", *overrides, paths)
    assert "chatter: 30 samples in " in text and "adding: 40 samples in " in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["rport"],
            "mft data: unknown subcommand 'rport'; did you mean report? Subcommands: report, show, prepare.",
        ),
        (["show", "--n", "0"], "--n needs a whole number from 1, got '0'"),
        (
            ["show", "task=namin"],
            "task=namin: there is no such task; did you mean naming? Tasks: adding, naming.",
        ),
        (["report", "data.seq_lenth=3"], "data=pack has no key 'seq_lenth'; did you mean seq_length?"),
        (["report", "-m"], "mft data has no flag -m"),
        (
            ["prepare", "data.paths=[/gone]"],
            "data.paths: /gone does not exist|task.gone.paths: /gone does not exist",
        ),
    ],
)
def test_mistakes_are_sentences(overrides: list[str], args: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", args[0], *overrides, *args[1:]])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert any(part in message for part in says.split("|")) and message.count("\n") == 1, message


def test_help_says_what_there_is(capsys) -> None:
    assert all(f"mft data {name}" in said(capsys, "--help") for name in ("report", "show", "prepare"))
