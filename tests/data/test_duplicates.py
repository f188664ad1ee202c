"""Exact duplicates: counted, and left out where asked; every row is accounted for either way."""

import json
import random

import pytest

from mft.data.cache.store import Samples, prepare
from mft.data.duplicates import mark_duplicates
from mft.data.formats import Chat
from mft.data.report import as_json, notes, tables, write_dropped
from mft.data.settings import DataSettings, Duplicates
from mft.data.task import Task
from tests.data.conftest import chat, write


@pytest.fixture
def stores(tmp_path, encoder):
    """`own`: rows 0 to 19, then 3 and 5 again, validated by files that repeat rows 7 and 8 and hold `new`
    twice.

    `other`: trains on what `own` validates as well, and on rows that `own` trains on, too.
    """
    rows = [chat(f"q{i}", f"a{i}") for i in range(20)]
    train = write(tmp_path / "own.jsonl", [*rows, rows[3], rows[5], rows[3]])
    valid = write(tmp_path / "valid.jsonl", [rows[7], rows[8], chat("new", "a"), chat("new", "a")])
    other = write(tmp_path / "other.jsonl", [rows[0], chat("new", "a"), chat("only here", "a")])
    tasks = [Task("own", [str(train)], valid=[str(valid)]), Task("other", [str(other)])]

    def make(**change):
        settings = DataSettings(split=[1, 0, 0], **change)
        return [prepare(task, encoder, settings, tmp_path / "cache") for task in tasks]

    return make


def rows_of(store):
    return {name: store.report[name] for name in ("rows", "kept", "samples")}


def test_duplicates_are_counted_and_kept(stores):
    own, other = stores()
    mark_duplicates([own, other], Duplicates.keep)
    assert own.report["duplicates"] == {"repeated": 4, "held out": 2}
    assert other.report["duplicates"] == {"repeated": 0, "held out": 1}
    assert rows_of(own) == {"rows": 27, "kept": 27, "samples": 27} and len(own) == 27
    said = notes([own, other], ["own", "other"])
    assert said[0] == (
        "own: 4 rows repeat an earlier row of the task, 2 rows train and are held out, too "
        "(data.duplicates=drop "
        "leaves them out)"
    )
    assert said[1].startswith("other: 1 rows train and are held out, too")


def test_duplicates_are_left_out_and_accounted_for(stores, tmp_path, encoder):
    own, other = stores()
    mark_duplicates([own, other], Duplicates.drop)
    assert rows_of(own) == {"rows": 27, "kept": 21, "samples": 21} and len(own) == 21
    assert rows_of(other) == {"rows": 3, "kept": 2, "samples": 2}
    for store in (own, other):
        report = store.report
        assert report["rows"] == report["kept"] + sum(report["dropped"].values())
        assert report["samples"] == sum(report["splits"].values()) == len(store)
        assert report["tokens"] == store.lengths_N.sum() and report["trained_tokens"] == store.trained_N.sum()
    train = Samples([own, other])
    origins = [own.origin(int(i)).rpartition(":")[2] for i in train.index_N[train.task_N == 0]]
    assert origins == [str(line) for line in range(1, 21) if line not in (8, 9)], "the validation rows stay"
    assert own.sample(7)[0].tolist() == encoder.encode(Chat().messages(chat("q9", "a9")))[0].tolist()
    assert len(Samples([own, other], "valid")) == 3
    write_dropped(tmp_path / "dropped.jsonl", [own, other], ["own", "other"])
    listed = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert len(listed) == 7 and {d["task"] for d in listed} == {"own", "other"}
    assert (listed[0]["line"], listed[0]["reason"]) == (21, "repeated")
    assert listed[0]["problem"].endswith("own.jsonl:4")
    assert not notes([own, other], ["own", "other"])
    assert [table.row_count for table in tables([own, other], ["own", "other"])] == [3, 3]
    assert json.loads(json.dumps(as_json([own, other], ["own", "other"])))["own"]["dropped"]["repeated"] == 4


def test_the_parts_of_a_row_are_no_duplicates_of_each_other(make_store):
    long = chat(*(f"turn {i} {'x ' * 8}" for i in range(12)))
    store = make_store(
        [long, long, chat("q", "a")], seq_length=64, long_samples="split_turns", split=[1, 0, 0]
    )
    parts = store.report["samples"]
    mark_duplicates([store], Duplicates.drop)
    assert store.report["duplicates"]["repeated"] == 1 and store.report["kept"] == 2
    assert len(store) == (parts - 1) // 2 + 1 > 2


@pytest.mark.parametrize("how", ["truncate_right", "split_turns"])
def test_what_rows_lost_is_not_counted_of_those_left_out(make_store, how):
    silent = [{"role": ("human", "bot")[i % 2], "content": "y " * 9, "train": i % 4 == 3} for i in range(8)]
    long = chat("q", "a", *(f"turn {i} {'x ' * 20}" for i in range(6)), "q", "word " * 99)
    rows = [long, chat("q", "a"), {"chat_rounds": silent}, long, {"chat_rounds": silent}, long]
    both, once = (
        make_store(r, name, seq_length=64, long_samples=how, split=[1, 0, 0])
        for name, r in (("both", rows), ("once", rows[:3]))
    )
    assert both.report["truncated"] + both.report["rounds_left_out"] > 2
    mark_duplicates([both], Duplicates.drop)
    mark_duplicates([once], Duplicates.drop)
    names = ("kept", "samples", "tokens", "truncated", "rounds_left_out", "parts_left_out")
    assert {name: both.report[name] for name in names} == {name: once.report[name] for name in names}


def test_which_rows_are_found_is_what_a_dictionary_finds(make_store):
    draw = random.Random(0)
    rows = [chat(f"q{draw.randrange(300)}", "a") for _ in range(1000)]
    store = make_store(rows, split=[8, 1, 1])
    ids = [store.sample(i)[0].tolist() for i in range(1000)]
    mark_duplicates([store], Duplicates.drop)
    first = {json.dumps(row): i for i, row in reversed(list(enumerate(rows)))}
    assert [store.sample(i)[0].tolist() for i in range(len(store))] == [
        ids[i] for i in sorted(first.values())
    ]
    assert store.report["duplicates"] == {"repeated": 1000 - len(first), "held out": 0}
