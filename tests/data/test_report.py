import io
import json

import numpy as np
import pytest
from rich.console import Console

from mft.data.report import as_json, notes, spans, tables, write_dropped
from mft.data.template import Template
from mft.data.tokenize import Encoder
from tests.data.conftest import TALK, chat


def printed(stores, names, width: int) -> list[list[list[str]]]:
    """Returns the cells of each line of each table, as a terminal of this width shows them."""
    found = []
    for table in tables(stores, names):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(table)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        found.append(
            [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
        )
    return found


def test_the_tables_account_for_every_row(make_store):
    a = make_store(
        [*(chat(f"q{i}", "a") for i in range(30)), chat("q"), chat("q" * 999, "a")], "a", seq_length=64
    )
    b = make_store([chat("q", "a " * 99)], "b", seq_length=64, long_samples="truncate_right", split=[0, 0, 1])
    rows, tokens = ({line[0]: line[1:] for line in lines} for lines in printed([a, b], ["a", "b"], 160))
    assert rows["a"][:3] == ["chat", "32", "30"] and rows["a"][-1] == "1 too long, 1 no trained token"
    assert rows["b"] == ["chat", "1", "1", "0", "0", "1", "1 truncated"]
    assert (
        rows["all"][:3] == ["", "33", "31"]
        and rows["all"][-1] == "1 too long, 1 no trained token, 1 truncated"
    )
    total = a.report["tokens"] + 64
    assert tokens["all"][0] == str(total) and tokens["all"][3:] == [f"{total / 31:.0f}", "", "", ""]
    assert tokens["b"] == ["64", str(b.report["trained_tokens"]), tokens["b"][2], "64", "64", "64", "64"]
    stored = json.loads(json.dumps(as_json([a, b], ["a", "b"])))
    assert stored["a"]["rows"] == 32 and stored["b"]["length"]["max"] == 64
    for account in stored.values():
        sizes = account["sizes"]
        assert {split: sizes[split]["samples"] for split in sizes} == account["splits"]
        counted = {"kept": "rows", "tokens": "tokens", "trained_tokens": "trained_tokens"}
        for total, part in counted.items():
            assert sum(size[part] for size in sizes.values()) == account[total]


@pytest.mark.parametrize("width", [80, 120])
def test_names_and_numbers_are_whole_in_a_narrow_terminal(make_store, width):
    name = "unit_tests_of_the_standard_library"
    rows = [
        *({"instruction": f"q{i}", "response": "a"} for i in range(1200)),
        {"instruction": "q", "response": 3},
    ]
    store = make_store(
        [*rows, *([rows[0] | {"response": "a " * 99}] * 3)], name, bad_rows="skip", seq_length=64
    )
    for number, lines in enumerate(printed([store, store], [name, "b"], width)):
        assert all("…" not in cell for line in lines for cell in line)
        upto = [line[0] for line in lines].index("b")
        assert "".join(line[0] for line in lines[:upto]) == name
        assert lines[0][2 if number == 0 else 1].replace(",", "").isdigit()
        if number == 0:
            assert lines[0][2:4] == ["1,204", "1,200"] and "".join(line[1] for line in lines[:upto]) == (
                "instruction_response"
            )
            assert " ".join(line[-1] for line in lines[:upto]).split() == [
                "1",
                "bad",
                "row,",
                "3",
                "too",
                "long",
            ]


def test_the_files_of_the_report_lose_nothing(make_store, tmp_path):
    a = make_store([chat("q", "    return x"), chat("q")], "a")
    b = make_store([chat("q", "x"), *[chat("q" * 999, "é")] * 30], "b", seq_length=64)
    write_dropped(tmp_path / "report" / "dropped.jsonl", [a, b], ["a", "b"])
    rows = [json.loads(line) for line in (tmp_path / "report" / "dropped.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["a"] + ["b"] * 30
    assert rows[0]["file"].endswith("a/rows.jsonl") and rows[0]["line"] == 2
    assert rows[0]["reason"] == "no trained token" and json.loads(rows[0]["row"]) == chat("q")
    assert all("data.seq_length is 64" in row["problem"] for row in rows[1:])
    assert notes([a, b], ["a", "b"]) == []


def test_half_of_a_surrogate_pair_can_be_reported(make_store, tmp_path):
    half = {"prompt": "q\ud800", "answer": "a"}
    store = make_store([half, {"prompt": "q", "answer": "a"}], bad_rows="skip")
    write_dropped(tmp_path / "dropped.jsonl", [store], ["docs"])
    (row,) = map(json.loads, (tmp_path / "dropped.jsonl").read_text().splitlines())
    assert json.loads(row["row"]) == half


def test_spans_spell_the_text_and_divide_it_where_loss_begins_and_ends(kind):
    template = Template()
    ids_S, trained_S = Encoder(kind, template).encode(TALK)
    stretches = spans(ids_S, trained_S, kind)
    end = str(kind.eos_token)
    assert "".join(text for text, _ in stretches) == kind.decode(ids_S, clean_up_tokenization_spaces=False)
    assert [trained for _, trained in stretches] == [False, True, False, True, False]
    assert stretches[1][0].strip(" ") == "return w * h\n" + end and stretches[3][0].strip(" ") == "<im" + end


def test_a_first_token_is_not_shown_as_trained(tokenizer):
    ids_S, _ = Encoder(tokenizer, Template()).encode(TALK)
    stretches = spans(ids_S, np.ones(len(ids_S), bool), tokenizer)
    assert [trained for _, trained in stretches] == [False, True]
