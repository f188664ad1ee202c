"""Whatever a file holds: every row becomes a sample or is reported, or a sentence says why. MFT_FUZZ_CASES of them."""

import gzip
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft.data.formats import KNOWN, Auto
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.store import prepare
from mft.data.task import Task
from mft.errors import UserError
from tests.data.conftest import chat, write

CASES = int(os.environ.get("MFT_FUZZ_CASES", 250))
BOM = b"\xef\xbb\xbf"

words = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\n", "\x00", "é", "\ud800", "<|endoftext|>", "<s>bot\n", "x" * 90]
)
roles = st.sampled_from(["system", "human", "user", "bot", "assistant", "gpt", "boot", "", None, 3])
scalars = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | words
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": roles,
        "content": words | values,
        "from": roles,
        "value": words,
        "train": scalars,
        "weight": scalars,
    },
)
fields = sorted(
    {name for f in KNOWN.values() for name in vars(f).values() if name} | {"chat_rounds", "messages", "conversations"}
)
rows = st.one_of(
    st.builds(chat, words.filter(bool), words.filter(bool)),
    st.builds(
        lambda key, turns: {key: turns},
        st.sampled_from(["chat_rounds", "messages", "conversations"]),
        st.lists(turns, max_size=4),
    ),
    st.dictionaries(st.sampled_from(fields), words | values, max_size=4),
    values,
)


def spelt(row) -> bytes:
    return json.dumps(row).encode()


lines = st.one_of(
    rows.map(spelt),
    rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    rows.map(lambda row: spelt(row)[:-1]),
    rows.map(lambda row: b'{"prompt": 1, "prompt": ' + spelt(row) + b"}"),
    rows.map(lambda row: spelt(row) + spelt(row)),
    st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"")),
    st.sampled_from([b"", b"  ", b"\r", BOM, b"NaN", b"[" * 100_000, b"{}", b'"text"', b"\xff\xfe{\x00}\x00"]),
)
contents = st.builds(
    lambda mark, parts, ends, last: (
        (BOM if mark else b"") + b"".join(p + e for p, e in zip(parts, ends, strict=False)) + last
    ),
    st.booleans(),
    st.lists(lines, max_size=8),
    st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=8, max_size=8),
    lines | st.just(b""),
)


def numbers_of_rows(content: bytes) -> set[int]:
    """The lines that are not blank, counted apart from the code that is tested."""
    return {number for number, line in enumerate(content.removeprefix(BOM).split(b"\n"), start=1) if line.strip()}


@given(
    contents,
    st.sampled_from(["plain", "gz", "zst"]),
    st.integers(0, 40),
    st.sampled_from([None, *KNOWN]),
    st.sampled_from(list(BadRows)),
    st.sampled_from(list(LongSamples)),
)
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_in_are_rows_kept_and_rows_reported(encoder, content, packing, cut, name, bad_rows, long_samples):
    with tempfile.TemporaryDirectory() as folder:
        stored = {"plain": bytes, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[packing](content)
        cut = 0 if packing == "plain" or cut > 8 else cut
        file = Path(folder, "rows.jsonl" + {"plain": ""}.get(packing, f".{packing}"))
        file.write_bytes(stored[: len(stored) - cut])
        task = Task("t", [folder], format=KNOWN[name] if name else Auto())
        options = DataSettings(seq_length=48, bad_rows=bad_rows, long_samples=long_samples)
        try:
            store = prepare(task, encoder, options, Path(folder, "cache"))
        except UserError as error:
            assert str(error) and ("task.t" in str(error) or "rows.jsonl" in str(error)), "it says where"
            if packing == "plain" and bad_rows == BadRows.skip and "none of its" in str(error):
                assert f"none of its {len(numbers_of_rows(content))} rows" in str(error)
            return
        assert not cut, "a file that was cut is not read short"
        dropped = [row["line"] for row in store.dropped()]
        kept = {int(store.origin(i).rpartition(":")[2]) for i in range(len(store))}
        assert len(dropped) == len(set(dropped)) and not kept & set(dropped)
        assert kept | set(dropped) == numbers_of_rows(content)
        report = store.report
        assert report["rows"] == report["kept"] + sum(report["dropped"].values()) == len(kept) + len(dropped)
        assert bad_rows == BadRows.skip or not report["dropped"]["bad row"]
        assert all(len(store.sample(i)[0]) <= 48 and store.sample(i)[1][1:].any() for i in range(len(store)))


def test_a_line_of_ten_megabytes(tmp_path, encoder):
    kept, long = chat("q", "a") | {"notes": "x" * 10_000_000}, chat("q", "word " * 100_000)
    file = write(tmp_path / "x.jsonl", [kept, long, {"chat_rounds": ["x" * 10_000_000]}])
    with file.open("ab") as out:
        out.write(b"{" * 10_000_000 + b"\n")
    store = prepare(Task("t", [str(file)]), encoder, DataSettings(bad_rows=BadRows.skip), tmp_path / "cache")
    assert store.report["kept"] == 1
    dropped = {row["line"]: row for row in store.dropped()}
    assert [dropped[line]["reason"] for line in (2, 3, 4)] == ["too long", "bad row", "bad row"]
    assert all(len(row["row"]) <= 2000 and len(row["problem"]) < 300 for row in dropped.values())


@pytest.mark.parametrize("content", [None, b"", b"\n\r\n  \n", BOM])
def test_empty_files_and_folders_are_told(tmp_path, encoder, content):
    (tmp_path / "docs").mkdir()
    if content is not None:
        (tmp_path / "docs" / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"task\.docs.*(it is empty|the files are empty)"):
        prepare(Task("docs", [str(tmp_path / "docs")]), encoder, DataSettings(), tmp_path / "cache")


def test_numbers_that_are_none(tmp_path, encoder):
    file = tmp_path / "x.jsonl"
    file.write_bytes(json.dumps(chat("q", "a") | {"score": math.nan, "limit": -math.inf}).encode())
    assert prepare(Task("t", [str(file)]), encoder, DataSettings(), tmp_path / "cache").report["kept"] == 1
