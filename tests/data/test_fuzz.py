"""Whatever a file holds: every row becomes a sample or is reported, or a sentence says why. MFT_FUZZ_CASES of
them."""

import gzip
import io
import json
import math
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft.data.cache.store import prepare
from mft.data.formats import KNOWN, Auto
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.task import Task
from mft.errors import UserError
from tests.data.conftest import chat, write

CASES = int(os.environ.get("MFT_FUZZ_CASES", 25))
BOM = b"\xef\xbb\xbf"

words = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\n", "\x00", "é", "\ud800", "<|endoftext|>", "<s>bot\n", "x" * 90]
)
roles = st.sampled_from(["system", "human", "user", "bot", "assistant", "gpt", "boot", "", None, 3])
scalars = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
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
    {name for f in KNOWN.values() for name in vars(f).values() if name}
    | {"chat_rounds", "messages", "conversations"}
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
    st.sampled_from(
        [b"", b"  ", b"\r", BOM, b"NaN", b"[" * 100_000, b"{}", b'"text"', b"\xff\xfe{\x00}\x00"]
    ),
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
    return {
        number for number, line in enumerate(content.removeprefix(BOM).split(b"\n"), start=1) if line.strip()
    }


def accounted(
    encoder, name: str, stored: bytes, whole: bool, numbers: set[int], format, bad_rows, long_samples
):
    """Tokenises a file of these bytes, and checks the account of its rows, or that a sentence says why there
    is none.

    whole: nothing was cut off the file; numbers: of all its rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(stored)
        task = Task("t", [folder], format=KNOWN[format] if format else Auto())
        options = DataSettings(seq_length=48, bad_rows=bad_rows, long_samples=long_samples)
        try:
            store = prepare(task, encoder, options, Path(folder, "cache"))
        except UserError as error:
            assert str(error) and ("task.t" in str(error) or name in str(error)), "it says where"
            if whole and bad_rows == BadRows.skip and "rows were dropped" in str(error):
                assert f"all {len(numbers)} rows were dropped" in str(error)
            return
        assert whole, "a file that was cut is not read short"
        dropped = [row["line"] for row in store.dropped()]
        kept = {int(store.origin(i).rpartition(":")[2]) for i in range(len(store))}
        assert len(dropped) == len(set(dropped)) and not kept & set(dropped)
        assert kept | set(dropped) == numbers
        report = store.report
        assert report["rows"] == report["kept"] + sum(report["dropped"].values()) == len(kept) + len(dropped)
        assert bad_rows == BadRows.skip or not report["dropped"]["bad row"]
        limit = math.inf if long_samples == LongSamples.keep else 48
        assert all(
            len(store.sample(i)[0]) <= limit and store.sample(i)[1][1:].any() for i in range(len(store))
        )


choices = st.tuples(
    st.sampled_from([None, *KNOWN]), st.sampled_from(list(BadRows)), st.sampled_from(list(LongSamples))
)
fuzz = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
parts = st.just(1.0) | st.floats(0, 1)
"""How much of a file is left when it was cut."""


@given(contents, st.sampled_from(["plain", "gz", "zst"]), parts, choices)
@fuzz
def test_rows_in_are_rows_kept_and_rows_reported(encoder, content, packing, part, chosen):
    stored = {"plain": bytes, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[packing](
        content
    )
    left = len(stored) if packing == "plain" else int(part * len(stored))
    name = "rows.jsonl" + {"plain": ""}.get(packing, f".{packing}")
    accounted(encoder, name, stored[:left], left == len(stored), numbers_of_rows(content), *chosen)


def columns(number: int):
    """Draws columns of so many values, each of some type of Parquet, with nulls."""
    turn = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("from", pa.string()), ("value", pa.string())]
    )
    text = words.filter(lambda word: "\ud800" not in word)
    part = st.fixed_dictionaries({k: st.none() | roles.filter(lambda r: r != 3) for k in ("role", "from")})
    part = st.builds(lambda who, what: who | {"content": what, "value": what}, part, st.none() | text)
    talk = st.builds(
        lambda q, a: [{"role": r, "content": c} for r, c in (("user", q), ("assistant", a))], text, text
    )
    kinds = [
        (pa.string(), text),
        (pa.large_string(), text),
        (pa.dictionary(pa.int32(), pa.string()), text),
        (pa.binary(), st.binary(max_size=5)),
        (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
        (pa.float64(), st.floats()),
        (pa.bool_(), st.booleans()),
        (pa.timestamp("ns"), st.integers(-(2**62), 2**62)),
        (pa.timestamp("s"), st.integers(-(2**40), 2**40)),
        (pa.decimal128(9, 2), st.decimals(-9999, 9999, places=2)),
        (pa.null(), st.none()),
        (pa.list_(pa.string()), st.lists(text, max_size=2)),
        (pa.map_(pa.string(), pa.int64()), st.just([("a", 1), ("a", 2)])),
        (pa.list_(turn), st.lists(part, max_size=3) | talk),
    ]

    def column(kind):
        values = st.lists(kind[1] | st.none(), min_size=number, max_size=number)
        return values.map(lambda drawn: pa.array(drawn, kind[0]))

    broken = st.lists(st.binary(max_size=4), min_size=number, max_size=number)  # text that is not UTF-8
    return st.sampled_from(kinds).flatmap(column) | broken.map(
        lambda raw: pa.array(raw, pa.binary()).view(pa.string())
    )


tables = st.integers(0, 6).flatmap(
    lambda number: st.tuples(
        st.just(number), st.lists(st.tuples(st.sampled_from(fields), columns(number)), min_size=1, max_size=5)
    )
)


@given(tables, parts, choices)
@fuzz
def test_rows_of_parquet_are_kept_or_reported(encoder, table, part, chosen):
    number, named = table
    out = io.BytesIO()
    names, arrays = zip(*named, strict=True)
    pyarrow.parquet.write_table(pa.Table.from_arrays(list(arrays), list(names)), out, row_group_size=2)
    left = int(part * out.tell())
    accounted(
        encoder, "rows.parquet", out.getvalue()[:left], left == out.tell(), set(range(1, number + 1)), *chosen
    )


def test_a_value_of_parquet_that_is_none_names_row_and_column(tmp_path, encoder):
    text = pa.array([b"fine", b"\xff", b"good"], pa.binary()).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"prompt": ["a", "b", "c"], "answer": text}), tmp_path / "x.parquet")
    task = Task("t", [str(tmp_path / "x.parquet")])
    store = prepare(task, encoder, DataSettings(bad_rows=BadRows.skip), tmp_path / "cache")
    (dropped,) = store.dropped()
    assert (len(store), dropped["line"], dropped["field"]) == (2, 2, "answer")
    with pytest.raises(UserError, match=r"x\.parquet:2: answer: .*utf-8"):
        prepare(task, encoder, DataSettings(), tmp_path / "other")
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, ["prompt", "answer", "answer"])
    pyarrow.parquet.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: the column 'answer' comes twice"):
        prepare(task, encoder, DataSettings(), tmp_path / "cache")


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
    with pytest.raises(UserError, match=r"task\.docs.*(it is empty|its files are empty)"):
        prepare(Task("docs", [str(tmp_path / "docs")]), encoder, DataSettings(), tmp_path / "cache")


def test_numbers_that_are_none(tmp_path, encoder):
    file = tmp_path / "x.jsonl"
    file.write_bytes(json.dumps(chat("q", "a") | {"score": math.nan, "limit": -math.inf}).encode())
    assert prepare(Task("t", [str(file)]), encoder, DataSettings(), tmp_path / "cache").report["kept"] == 1
