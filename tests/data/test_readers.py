import gzip
import json
import zlib

import pytest
import zstandard

from mft.data.task import Task
from mft.errors import UserError

TEXT = b'{"text": "a"}\n' * 3


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"q{i}", "answer": "a"} for i in range(3000)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text[:1000]) + gzip.compress(text[1000:]))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(pack(text[:1000]) + pack(text[1000:]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    files = Task("t", [str(tmp_path)]).files()
    assert len(files) == 4
    for file in files:
        reading = Task("t", [str(file)]).rows()
        assert [row for _, _, row in reading] == rows and reading.done == reading.total


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x.jsonl.gz", "cannot be read to its end: .*ended before the end-of-stream marker"),
        ("x.jsonl.zst", "cannot be read to its end: it was cut; fetch it again"),
        ("x.parquet", "is not a readable Parquet file"),
    ],
)
def test_a_cut_file_is_refused_not_read_short(tmp_path, name, says):
    text = b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(5000))
    packed = gzip.compress(text) if name.endswith("gz") else zstandard.ZstdCompressor().compress(text)
    (tmp_path / name).write_bytes(packed[:-20])
    with pytest.raises(UserError, match=f"{name}: {says}"):
        list(Task("t", [str(tmp_path)]).rows())


@pytest.mark.parametrize(
    ("name", "packed", "says"),
    [
        ("x.jsonl.gz", TEXT, "Not a gzipped file"),
        ("x.jsonl.gz", zlib.compress(TEXT), "Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(TEXT, mtime=0)[:10] + b"\xff" * 20, "while decompressing"),
        ("x.jsonl.zst", TEXT, r"it is not zstandard data \(.+\)"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name, packed, says):
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(UserError, match=f"{name}: cannot be read to its end: .*{says}"):
        list(Task("t", [str(tmp_path)]).rows())


def test_zeros_after_gzip_data_are_no_data(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(TEXT) + bytes(512))
    assert [row for _, _, row in Task("t", [str(tmp_path)]).rows()] == [{"text": "a"}] * 3


def test_a_key_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "a", "answer": "b", "answer": "c"}\n')
    ((_, _, error),) = list(Task("t", [str(tmp_path)]).rows())
    assert "the key 'answer' comes twice" in str(error) and error.text.startswith('{"prompt"')
