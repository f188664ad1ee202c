import io
import json

from rich.console import Console

from mft.data.report import as_json, dropped_lines, table
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
