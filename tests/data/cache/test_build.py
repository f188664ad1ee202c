import json

from mft.data.cache.store import prepare
from mft.data.settings import BadRows, DataSettings
from mft.data.task import Task
from tests.data.conftest import chat


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
