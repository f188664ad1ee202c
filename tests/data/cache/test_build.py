import json

import pytest

from mft.data.cache import build
from mft.data.cache.store import prepare
from mft.data.formats import Chat
from mft.data.settings import BadRows, DataSettings
from mft.data.task import Task
from mft.data.template import OWN
from mft.data.template_choice import adopt, named
from mft.data.tokenize import Encoder
from tests.data.conftest import CHATML, chat, write


@pytest.mark.parametrize("name", ["mft", "mftcoder", OWN])
def test_rows_that_one_string_would_encode_otherwise_are_counted(kind, name, tmp_path):
    kind.chat_template = CHATML
    template = named(name, None, kind)
    adopt(kind, template)
    encoder = Encoder(kind, template)
    rows = [chat(f"q{i}", ("    return\n", "\n\n  of a", "no", "é ")[i % 4], "r", " x") for i in range(60)]
    task = Task("t", [str(write(tmp_path / "x.jsonl", rows))])
    found = prepare(task, encoder, DataSettings(), tmp_path / "cache").report["one_string"]
    differ = 0
    for row in rows:
        messages = Chat().messages(row)
        plain = [{"role": m.role, "content": m.content} for m in messages]
        whole = kind.apply_chat_template(plain, tokenize=True, return_dict=False)
        differ += whole != encoder.encode(messages)[0].tolist()
    assert found == {"compared": 60, "differ": differ}
    if name == "mft" and not kind.bos_token:
        assert differ > 0, "newlines merge with the blanks of an answer in this tokenizer"


def test_of_many_rows_one_in_sixty_four_is_compared(make_store, monkeypatch):
    monkeypatch.setattr(build, "COMPARED_FIRST", 10)
    store = make_store([chat(f"q{i}", "a") for i in range(100)])
    assert store.report["one_string"]["compared"] == 10 + 1


def test_every_row_that_is_no_sample_is_written_down(tmp_path, encoder):
    lines = [json.dumps(chat(f"q{i}", "a")).encode() for i in range(60)]
    lines += [b'{"chat_rounds": [{"role": "human", "content": "x"}, {"role": "boot"}]}'] * 30
    lines += [b"\xff{", json.dumps(chat("q" * 900, "a")).encode(), json.dumps(chat("q")).encode()]
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\n".join(lines))
    settings = DataSettings(bad_rows=BadRows.skip, seq_length=100)
    store = prepare(Task("t", [str(file)]), encoder, settings, tmp_path / "cache")
    dropped = list(store.dropped())
    assert len(dropped) == 33 == sum(store.report["dropped"].values()) and store.report["kept"] == 60
    assert [d["line"] for d in dropped if d["reason"] == "bad row"] == list(range(61, 92))
    assert dropped[0]["file"] == str(file) and dropped[0]["field"] == "chat_rounds[1].content"
    assert json.loads(dropped[0]["row"])["chat_rounds"][1] == {"role": "boot"}
    unreadable = next(d for d in dropped if d["line"] == 91)
    assert "is not UTF-8" in unreadable["problem"] and unreadable["row"] == "\ufffd{"
    assert {d["line"]: d["reason"] for d in dropped[-2:]} == {92: "too long", 93: "no trained token"}
