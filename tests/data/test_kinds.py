"""Arrays of rows are read; files of other kinds are refused with what they are and what to do."""

import gzip
import json
import subprocess
import sys

import pytest

from mft.data import kinds
from mft.data.readers import Rows
from mft.data.task import Task
from mft.errors import UserError

PAIRS = [{"prompt": f"q{i} [,]", "answer": 'a"\u2028]\n' * i} for i in range(9)]


def read(file) -> list:
    return [row for _, _, row in Rows([file])]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\n  "])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, indent, mark, chunk):
    monkeypatch.setattr(kinds, "CHUNK", chunk)
    file = tmp_path / "x.json"
    file.write_bytes(mark + json.dumps(PAIRS, indent=indent, ensure_ascii=False).encode() + b"\n")
    assert read(file) == PAIRS
    assert [line for _, line, _ in Rows([file])] == list(range(1, 10))


def test_arrays_under_other_names(tmp_path):
    text = json.dumps(PAIRS)
    (tmp_path / "y.jsonl").write_text(text)
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as packed:
        packed.write(text)
    assert read(tmp_path / "y.jsonl") == read(tmp_path / "z.jsonl.gz") == PAIRS
    (tmp_path / "empty.json").write_text(" [ ]\n")
    assert read(tmp_path / "empty.json") == []
    (tmp_path / "lines.jsonl").write_text('[1]\n{"a": 1}\n')  # lines of which the first is a list
    assert read(tmp_path / "lines.jsonl") == [[1], {"a": 1}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}, {"a": "b', 'near \'{"a": "b\' after row 1'),
        ('[{"a": 1}', "it ends after row 1"),
        ('[{"a": 1} {"a": 2}]', "stands where ',' is expected after row 1"),
        ('[{"a": 1},]', "Expecting value near"),
        ('[{"a": 1}] x', "text follows the end of its JSON array"),
        ('[{"a": 1, "a": 2}]', "the key 'a' comes twice in one object before its first row"),
        ("[" * 99_999, "nested too deeply"),
    ],
)
def test_a_broken_array_is_refused(tmp_path, text, says):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError) as raised:
        read(tmp_path / "x.json")
    assert says in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", gzip.compress(b"{}", mtime=0), r"is gzip data; name it \*\.jsonl\.gz"),
        ("x.jsonl", b"\x28\xb5\x2f\xfd\x00", "is zstandard data"),
        ("x.json", b"PAR1\x00", "is a Parquet file"),
        ("x.jsonl", b"PK\x03\x04", "is a zip archive"),
        ("x.jsonl", '{"prompt": "q"}'.encode("utf-16"), r"is UTF-16 text; convert it: iconv"),
        ("x.jsonl", '{"prompt": "q"}'.encode("utf-16-le"), "binary data, or text in UTF-16"),
        ("x.csv", b"prompt,answer\na,b\n", r"is a table \(CSV\).*csv\.DictReader"),
        ("x.TSV", b"prompt\tanswer\na\tb\n", r"is a table \(TSV\).*delimiter"),
    ],
)
@pytest.mark.parametrize("stops", [True, False])
def test_other_kinds_are_refused_before_a_run_whatever_becomes_of_bad_rows(
    tmp_path, name, content, says, stops
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        Task("t", [str(tmp_path / name)]).check_rows(stops)
    assert "bad_rows" not in str(raised.value)


def test_the_command_given_for_a_table_makes_rows(tmp_path):
    (tmp_path / "x.csv").write_text('prompt,answer\n"a, b",c\n')
    with pytest.raises(UserError) as raised:
        read(tmp_path / "x.csv")
    command = str(raised.value).partition("To convert it: ")[2].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=300)
    assert read(tmp_path / "x.jsonl") == [{"prompt": "a, b", "answer": "c"}]


def test_objects_over_several_lines_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(PAIRS[0], indent=1))
    with pytest.raises(UserError, match=r"x\.jsonl:1: is not JSON.*jq -c \. x\.jsonl > ") as raised:
        Task("t", [str(tmp_path / "x.jsonl")]).check_rows(True)
    assert "bad_rows" not in str(raised.value)


def test_bad_first_rows_are_known_before_a_run_and_skipping_is_advised_where_others_are_sound(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "q", "answer": 3}\n{"prompt": "q", "answer": "a"}\n')
    task = Task("t", [str(file)])
    with pytest.raises(
        UserError, match=r"x\.jsonl:1: answer: must be text, got 3.*data\.bad_rows=skip leaves such rows out"
    ):
        task.check_rows(stops=True)
    task.check_rows(stops=False)
    file.write_text('{"prompt": "q", "answer": 3}\n' * 9)
    with pytest.raises(UserError, match=r"must be text, got 3$"):
        task.check_rows(True)
    file.write_text('{"foo": 1}\n')
    with pytest.raises(UserError, match=r"task\.t: no format fits"):
        task.check_rows(True)
