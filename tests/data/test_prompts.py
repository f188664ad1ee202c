"""Files of prompts that people bring."""

from __future__ import annotations

import gzip
import json
from dataclasses import astuple
from pathlib import Path

import pytest

from mft.batch import Prompt
from mft.data.prompts import read_prompts
from mft.errors import UserError


def row(*turns: str) -> dict:
    return {
        "chat_rounds": [{"role": ("human", "bot")[i % 2], "content": text} for i, text in enumerate(turns)]
    }


def test_marks_line_ends_and_separators_of_unicode_are_no_rows(tmp_path: Path) -> None:
    lines = [json.dumps(row("a\u2028b\x85c", "d"), ensure_ascii=False), "", json.dumps(row("q"))]
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_prompts(tmp_path / "p.jsonl") == [
        Prompt("", [{"role": "user", "content": "a\u2028b\x85c"}], "d"),
        Prompt("", [{"role": "user", "content": "q"}]),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            b'{"chat_rounds": [{"role": "human", "content": "\xe4"}]}',
            "is not UTF-8: byte b'\\xe4' at byte 47",
        ),
        (b"\xff\xfe{", "is not UTF-8: byte b'\\xff' at byte 0"),
        (b"[1]", "must be an object with the field chat_rounds, got [1]"),
        (b"null", "must be an object with the field chat_rounds"),
        (b'{"chat_rounds": "x"}', "chat_rounds: must be a list of rounds"),
        (b'{"chat_rounds": []}', "chat_rounds: a human turn to be answered is missing"),
        (b'{"chat_rounds": [3]}', "chat_rounds[0]: must be an object with the field role"),
        (b'{"chat_rounds": [{"role": "human", "content": null}]}', "chat_rounds[0].content: must be text"),
        (b'{"chat_rounds": [{"role": ["human"], "content": "x"}]}', "chat_rounds[0].role: must be text"),
        (
            b'{"chat_rounds": [{"role": "tool", "content": "x"}]}',
            "chat_rounds[0].role: 'tool' is none of system, user, human",
        ),
        (
            b'{"chat_rounds": [{"role": "bot", "content": "x"}]}',
            "chat_rounds: a human turn to be answered is missing",
        ),
        (b'{"chat_rounds"', "is not JSON"),
        (b"[" * 99_999, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not usable"),
    ],
)
def test_wrong_rows_are_one_sentence_with_file_and_line(tmp_path: Path, line: bytes, says: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(json.dumps(row("q")).encode() + b"\n" + line)
    with pytest.raises(UserError) as raised:
        read_prompts(file)
    text = str(raised.value)
    assert (
        text.startswith(f"train.prompts: {file}:2: ")
        and says in text
        and "\n" not in text
        and len(text) < 600
    )


S, H, B = ({"role": role, "content": role[0]} for role in ("system", "human", "bot"))


@pytest.mark.parametrize(
    ("rounds", "roles", "expected"),
    [
        ([H, B | {"content": ""}], "user", ""),
        ([H, B | {"content": ""}, H, B], "user assistant user", "b"),
        ([H | {"content": ""}], "user", ""),
        ([H, H], "user user", ""),
        ([H, B, B], "user assistant", "b"),
        ([B, H], "assistant user", ""),
        ([H, S, H, B], "user system user", "b"),
        ([H, B, S], "user assistant system", ""),
        ([S, S, H], "system system user", ""),
        ([H, B | {"train": False}, H], "user assistant user", ""),
        ([H, B | {"loss_mask": 0}], "user", "b"),
        ([H | {"mask": "x"}, B | {"weight": 0.5}], "user", "b"),
        ([H, B | {"train": "no", "tool_calls": [1], "name": 3}], "user", "b"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "user", "a"),
    ],
)
def test_turns_may_come_in_any_order_and_with_any_fields(
    tmp_path: Path, rounds: list, roles: str, expected: str
) -> None:
    line = json.dumps({"chat_rounds": rounds, "data_name": 7, "loss_mask": "x"}) + "\n"
    (tmp_path / "p.jsonl").write_text(line)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    for name in ("p.jsonl", "p.jsonl.gz"):
        ((about, turns, answer),) = map(astuple, read_prompts(tmp_path / name))
        assert (about, " ".join(turn["role"] for turn in turns), answer) == ("7", roles, expected)
        assert [turn["content"] for turn in turns] == [turn["content"] for turn in rounds[: len(turns)]]


def test_a_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(tmp_path / "prompts.jsonl")
