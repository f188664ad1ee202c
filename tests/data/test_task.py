import math
import os
import time

import pytest

from mft.data.cache.store import prepare
from mft.data.formats import KNOWN, Auto, RowError
from mft.data.settings import BadRows, DataSettings
from mft.data.task import Task, all_tasks
from mft.errors import UserError
from tests.data.conftest import chat, write


def test_files_are_found_below_and_sorted(tmp_path):
    for name in ("b.jsonl", "a/2.JSONL", "a/1.jsonl", "a/notes.txt"):
        write(tmp_path / "docs" / name, [chat("q", "a")])
    write(tmp_path / "far" / "far.jsonl", [chat("q", "a")])
    (tmp_path / "docs" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "docs" / "a" / "back").symlink_to(tmp_path / "docs")
    files = Task("docs", [str(tmp_path / "docs")]).files()
    names = [str(file.relative_to(tmp_path / "docs")) for file in files]
    assert names == ["a/1.jsonl", "a/2.JSONL", "b.jsonl", "link/far.jsonl"]
    one = Task("docs", [str(tmp_path / "docs" / "b.jsonl")])
    assert one.files() == [tmp_path / "docs" / "b.jsonl"]


def test_missing_paths_name_the_nearest_and_the_advice(tmp_path):
    (tmp_path / "docstring").mkdir()
    task = Task("docs", [str(tmp_path / "docstrings")], hint="run `mft demo` first")
    with pytest.raises(UserError) as raised:
        task.files()
    assert str(raised.value) == (
        f"task.docs.paths: {tmp_path}/docstrings does not exist; did you mean docstring?; run `mft demo` "
        f"first"
    )
    with pytest.raises(UserError, match=r"nor does .*gone"):
        Task("docs", [str(tmp_path / "gone" / "x")]).files()
    with pytest.raises(UserError, match=r"no \*\.jsonl, .* file .*it is empty"):
        Task("docs", [str(tmp_path / "docstring")]).files()
    (tmp_path / "docstring" / "x.json").touch()
    with pytest.raises(UserError, match=r"it holds: \.json"):
        Task("docs", [str(tmp_path / "docstring")]).files()
    with pytest.raises(UserError, match=r"task\.docs\.paths: is empty"):
        Task("docs").files()


def test_a_file_counts_once(tmp_path):
    file = write(tmp_path / "docs" / "x.jsonl", [chat("q", "a")])
    with pytest.raises(UserError, match="named twice"):
        Task("docs", [str(tmp_path / "docs"), str(file)]).files()


def test_rows_survive_marks_line_ends_and_blanks_and_report_broken_ones(tmp_path):
    file = tmp_path / "x.jsonl"
    lines = [
        b'\xef\xbb\xbf{"a": 1}\r\n',
        b"\r\n",
        b"   \n",
        b'{"a": \n',
        b'{"a": "\xff"}\n',
        b"[" * 100_000 + b"\n",
        b'{"a": ' + b"9" * 5000 + b"}\n",
        b'{"a": 2}',
    ]
    file.write_bytes(b"".join(lines))
    rows = list(Task("t", [str(file)]).rows())
    assert [line for _, line, _ in rows] == [1, 4, 5, 6, 7, 8]
    assert rows[0][2] == {"a": 1} and rows[-1][2] == {"a": 2}
    errors = [row for _, _, row in rows[1:-1]]
    assert all(isinstance(error, RowError) and str(error).startswith(f"{file}:") for error in errors)
    assert "is not JSON: Expecting value" in str(errors[0]) and str(errors[0]).startswith(f"{file}:4: ")
    assert "is not UTF-8: byte b'\\xff' at byte 7" in str(errors[1])
    assert "nested too deeply" in str(errors[2])
    assert "digits" in str(errors[3])


def test_fingerprint_is_of_contents_only_and_remembered(tmp_path, monkeypatch):
    file = write(tmp_path / "docs" / "x.jsonl", [chat("q", "a")])
    old = time.time() - 100
    os.utime(file, (old, old))
    monkeypatch.setattr(
        "mft.data.cache.fingerprint.YOUNG_SECONDS", -1.0
    )  # the time of a file's change cannot be set back
    task, cache = Task("docs", [str(tmp_path / "docs")]), tmp_path / "cache"
    first = task.fingerprint(cache)
    moved = write(tmp_path / "other" / "y.jsonl", [chat("q", "a")])
    assert Task("other", [str(moved)]).fingerprint(cache) == first
    with monkeypatch.context() as patch:
        patch.setattr(
            "mft.data.cache.fingerprint._digest", lambda file: pytest.fail("the file was read again")
        )
        assert task.fingerprint(cache) == first
    write(file, [chat("q", "b")])
    assert task.fingerprint(cache) != first
    (cache / "fingerprints.json").write_text("{broken")
    assert task.fingerprint(cache) != first


def test_a_file_changed_within_a_tick_of_the_clock_is_seen(tmp_path):
    file = write(tmp_path / "x.jsonl", [chat("q", "a")])
    stamp = file.stat().st_mtime_ns
    task = Task("docs", [str(file)])
    first = task.fingerprint(tmp_path / "cache")
    write(file, [chat("q", "b")])
    os.utime(file, ns=(stamp, stamp))
    assert task.fingerprint(tmp_path / "cache") != first


def test_other_content_of_the_same_size_and_time_is_seen(tmp_path, monkeypatch):
    """As a copy with `cp -p`, `rsync -t` or `tar` leaves it."""
    monkeypatch.setattr("mft.data.cache.fingerprint.YOUNG_SECONDS", -1.0)
    file = write(tmp_path / "x.jsonl", [chat("q", "a")])
    os.utime(file, (1e9, 1e9))
    task = Task("docs", [str(file)])
    first = task.fingerprint(tmp_path / "cache")
    other = write(tmp_path / "other.jsonl", [chat("q", "b")])
    os.utime(other, (1e9, 1e9))
    time.sleep(0.02)  # more than a tick of the file system's clock
    other.rename(file)
    assert file.stat().st_mtime == 1e9
    assert task.fingerprint(tmp_path / "cache") != first


def test_tasks_from_paths_are_named_after_them(tmp_path):
    write(tmp_path / "one.d" / "x.jsonl", [])
    write(tmp_path / "two.jsonl", [])
    tasks = all_tasks({}, [f"{tmp_path}/one.d/", f"{tmp_path}/two.jsonl"])
    assert [task.name for task in tasks] == ["one.d", "two"]
    assert tasks[0].format == Auto()


def test_duplicate_names_are_refused_with_both_origins():
    with pytest.raises(UserError, match=r"data\.paths: /b/docs .*'docs', beside task\.docs \(/a\)"):
        all_tasks({"docs": Task(paths=["/a"])}, ["/b/docs"])
    with pytest.raises(UserError, match=r"data\.paths: /c/docs .*beside data\.paths \(/b/docs\)"):
        all_tasks({}, ["/b/docs", "/c/docs"])


def test_all_tasks_takes_names_from_keys():
    tasks = all_tasks({"a": Task(paths=["/a"]), "b": Task(name="c", paths=["/c"])}, ["/d"])
    assert [task.name for task in tasks] == ["a", "c", "d"]
    with pytest.raises(UserError, match=r"task\.b\.name: 'a' is already"):
        all_tasks({"a": Task(), "b": Task(name="a")}, [])
    with pytest.raises(UserError, match="no task is chosen"):
        all_tasks({}, [])


def test_the_format_is_settled_once_and_said(tmp_path, encoder):
    file = tmp_path / "x.jsonl"
    rows = [
        {"id": 1},
        {"question": "q", "answer": "a"},
        {"prompt": "q", "answer": "a"},
        {"question": "r", "answer": "b"},
    ]
    write(file, rows)
    store = prepare(Task("t", [str(file)]), encoder, DataSettings(bad_rows=BadRows.skip), tmp_path / "cache")
    assert store.report["format"] == "question_answer" and store.report["kept"] == 2
    assert store.report["dropped"]["bad row"] == 2
    write(file, [{"foo": 1}])
    with pytest.raises(UserError, match=r"task\.t: no format fits its rows; fields of the first one: 'foo'"):
        prepare(Task("t", [str(file)]), encoder, DataSettings(), tmp_path / "cache")


def test_valid_files_validate_and_the_others_train(tmp_path, encoder):
    train = write(tmp_path / "train.jsonl", [chat(f"q{i}", "a") for i in range(60)])
    valid = write(tmp_path / "valid.jsonl", [chat(f"v{i}", "a") for i in range(7)])
    task = Task("t", [str(train)], valid=[str(valid)])
    store = prepare(task, encoder, DataSettings(), tmp_path / "cache")
    assert store.report["splits"] == {"train": 60, "valid": 7, "test": 0}
    both = Task("t", [str(train), str(valid)])
    assert both.fingerprint(tmp_path / "cache") != task.fingerprint(tmp_path / "cache")


@pytest.mark.parametrize("name", ["auto", *KNOWN])
def test_a_format_may_be_given_by_its_name(tmp_path, name):
    (task,) = all_tasks({"t": Task(paths=["x"], format=name)}, [])
    assert task.format == KNOWN.get(name, Auto())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"format": "mesages"},
            r"task\.t\.format='mesages': unknown format; did you mean messages\? Allowed: auto",
        ),
        ({"format": ["messages"]}, r"task\.t\.format=\['messages'\]: unknown format"),
        (
            {"format": {"prompt": "q", "answer": "a"}},
            r"_target_: mft\.data\.formats\.Pair, prompt: my_question",
        ),
        ({"format": None}, r"task\.t\.format=null: unknown format"),
        ({"weight": math.nan}, r"task\.t\.weight=nan must be at least 0 and finite"),
        ({"weight": math.inf}, r"task\.t\.weight=inf"),
        ({"weight": -0.5}, r"task\.t\.weight=-0\.5"),
        ({"name": "a\nb"}, "printable characters"),
        ({"name": "a" * 5000}, "at most 200 printable characters"),
        ({"paths": [""]}, r"task\.t\.paths=\[''\]: every entry"),
        ({"paths": ["x"], "valid": [3]}, r"task\.t\.valid=\[3\]: every entry"),
    ],
)
def test_values_that_types_cannot_refuse_are_refused_by_name(fields, says):
    with pytest.raises(UserError, match=says) as raised:
        all_tasks({"t": Task(**fields)}, [])
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)
