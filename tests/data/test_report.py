import io
import json

from rich.console import Console

from mft.data.report import as_json, dropped_lines, notes, table, write_dropped
from tests.data.conftest import chat


def test_the_table_accounts_for_every_row(make_store):
    a = make_store([*(chat(f"q{i}", "a") for i in range(30)), chat("q"), chat("q" * 999, "a")], "a", seq_length=64)
    b = make_store([chat("q", "a " * 99)], "b", seq_length=64, long_samples="truncate_right")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table([a, b], ["a", "b"]))
    text = console.export_text()
    cells = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[1:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert cells["a"][1:4] == ["chat", "32", "30"] and cells["a"][-1] == "1 too long, 1 no trained token"
    assert cells["b"][-1] == "1 cut"
    assert cells["all"][1:4] == ["", "33", "31"]
    lines = dropped_lines([a, b], ["a", "b"])
    assert lines[0].startswith("a: ") and "rows.jsonl:31: no trained token" in lines[0]
    assert "rows.jsonl:32: too long: " in lines[1]
    stored = json.loads(json.dumps(as_json([a, b], ["a", "b"])))
    assert stored["a"]["rows"] == 32 and stored["b"]["length"]["max"] == 64


def test_the_files_of_the_report_lose_nothing(make_store, tmp_path):
    a = make_store([chat("q", "    return x"), chat("q")], "a")
    b = make_store([chat("q", "x"), *[chat("q" * 999, "é")] * 30], "b", seq_length=64)
    write_dropped(tmp_path / "report" / "dropped.jsonl", [a, b], ["a", "b"])
    rows = [json.loads(line) for line in (tmp_path / "report" / "dropped.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["a"] + ["b"] * 30
    assert rows[0]["file"].endswith("a/rows.jsonl") and rows[0]["line"] == 2
    assert rows[0]["reason"] == "no trained token" and json.loads(rows[0]["row"]) == chat("q")
    assert all("data.seq_length is 64" in row["problem"] for row in rows[1:])
    (said,) = notes([a, b], ["a", "b"])
    assert said.startswith("a: apply_chat_template(tokenize=True)") and "for 1 of 2 rows" in said
