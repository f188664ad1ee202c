import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mft.data.cache import build
from mft.data.cache.blocks import BLOCK
from mft.data.cache.store import Samples, prepare
from mft.data.formats import Chat
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.task import Task
from mft.data.task_files import DataFile
from mft.errors import UserError
from tests.data.conftest import chat, write

ROWS = [chat(f"What is {i}?", "x " * (i % 7 + 1)) for i in range(200)]


def test_samples_are_those_of_the_encoder(make_store, encoder, monkeypatch):
    monkeypatch.setattr(build, "BATCH_ROWS", 7)
    store = make_store(ROWS)
    assert len(store) == 200
    for i in (0, 6, 7, 199):
        ids_S, trained_S = store.sample(i)
        expected_ids, expected_trained = encoder.encode(Chat().messages(ROWS[i]))
        assert ids_S.dtype == np.int32 and ids_S.tolist() == expected_ids.tolist()
        assert trained_S.dtype == bool and trained_S.tolist() == expected_trained.tolist()
        assert store.lengths_N[i] == len(ids_S) and store.trained_N[i] == trained_S.sum()
        assert store.origin(i).endswith(f"rows.jsonl:{i + 1}")
    report = store.report
    assert report["rows"] == report["kept"] == sum(report["splits"].values()) == 200
    assert report["tokens"] == store.lengths_N.sum() and report["trained_tokens"] == store.trained_N.sum()


def test_small_vocabularies_take_two_bytes_a_token(make_store, tmp_path):
    store = make_store(ROWS)
    folder = tmp_path / "cache" / "tokens" / store.fingerprint
    assert (folder / "ids.bin").stat().st_size == 2 * store.report["tokens"]


def test_large_vocabularies_take_four(tmp_path, encoder, monkeypatch):
    task = Task("docs", [str(write(tmp_path / "x.jsonl", ROWS[:3]))])
    monkeypatch.setattr(encoder, "vocab_size", 70_000)
    store = prepare(task, encoder, DataSettings(), tmp_path / "cache")
    assert store.sample(2)[0].tolist() == encoder.encode(Chat().messages(ROWS[2]))[0].tolist()
    folder = tmp_path / "cache" / "tokens" / store.fingerprint
    assert (folder / "ids.bin").stat().st_size == 4 * store.report["tokens"]


def test_the_cache_is_reused_and_follows_what_matters(tmp_path, encoder, monkeypatch):
    file = write(tmp_path / "x.jsonl", ROWS[:5])
    task, cache = Task("docs", [str(file)]), tmp_path / "cache"
    first = prepare(task, encoder, DataSettings(), cache)
    built = []
    write_store = build.write
    monkeypatch.setattr(build, "write", lambda *args: (built.append(args), write_store(*args)))
    again = prepare(task, encoder, DataSettings(window=7, bad_rows=BadRows.skip), cache)
    moved = prepare(
        Task("other", [str(write(tmp_path / "y.jsonl", ROWS[:5]))]), encoder, DataSettings(), cache
    )
    assert not built and again.fingerprint == moved.fingerprint == first.fingerprint
    assert moved.origin(4) == f"{tmp_path}/y.jsonl:5"
    for settings in (DataSettings(seq_length=50), DataSettings(split=[1, 1, 1])):
        assert prepare(task, encoder, settings, cache).fingerprint != first.fingerprint
    write(file, ROWS[:6])
    assert len(prepare(task, encoder, DataSettings(), cache)) == 6
    assert len(built) == 3


class Elsewhere(Task):
    """Reads the files beside those of its paths."""

    @property
    def data_files(self):
        found = [DataFile(path.with_name("b.jsonl")) for path in map(Path, self.paths)]
        return [*found, DataFile(found[0].path.with_name("held.jsonl"), "valid", "valid")]


class Renamed(Task):
    """Overrides the methods that are made of `data_files`."""

    def files(self):
        return [Path(path).with_name("b.jsonl") for path in self.paths]


@pytest.mark.parametrize("kind", [Elsewhere, Renamed])
def test_rows_are_traced_to_the_files_that_a_subclass_reads(tmp_path, encoder, kind):
    given, read = (
        write(tmp_path / name, rows) for name, rows in (("a.jsonl", ROWS[:3]), ("b.jsonl", ROWS[3:9]))
    )
    held = write(tmp_path / "held.jsonl", ROWS[9:11])
    store = prepare(kind("docs", [str(given)]), encoder, DataSettings(), tmp_path / "cache")
    assert [store.origin(i) for i in range(6)] == [f"{read}:{line}" for line in range(1, 7)]
    expected = [{"file": str(held), "split": "valid", "rows": 2}] if kind is Elsewhere else []
    assert store.held_out_files() == expected and len(store) == (8 if expected else 6)
    write(read, ROWS[20:22])  # the cache follows that file, too
    assert (
        len(prepare(kind("docs", [str(given)]), encoder, DataSettings(), tmp_path / "cache"))
        == len(store) - 4
    )


def test_plain_strings_and_enums_are_the_same_options(tmp_path, encoder):
    task = Task("docs", [str(write(tmp_path / "x.jsonl", ROWS[:5]))])
    typed = DataSettings(long_samples=LongSamples.truncate_right)
    plain = DataSettings(long_samples="truncate_right", split=[95, 5, 0])
    stores = [prepare(task, encoder, settings, tmp_path / "cache") for settings in (typed, plain)]
    assert stores[0].fingerprint == stores[1].fingerprint


def test_a_damaged_store_is_built_again(tmp_path, encoder):
    task, cache = Task("docs", [str(write(tmp_path / "x.jsonl", ROWS[:5]))]), tmp_path / "cache"
    first = prepare(task, encoder, DataSettings(), cache)
    folder = cache / "tokens" / first.fingerprint
    ids = [first.sample(i)[0].tolist() for i in range(5)]
    (folder / "ids.bin").write_bytes(b"\0\0")
    assert [prepare(task, encoder, DataSettings(), cache).sample(i)[0].tolist() for i in range(5)] == ids
    (folder / "meta.json").unlink()
    assert [prepare(task, encoder, DataSettings(), cache).sample(i)[0].tolist() for i in range(5)] == ids


def test_what_a_killed_process_left_is_removed(tmp_path, encoder):
    task, cache = Task("docs", [str(write(tmp_path / "x.jsonl", ROWS[:5]))]), tmp_path / "cache"
    fingerprint = prepare(task, encoder, DataSettings(), cache).fingerprint
    (cache / "tokens" / fingerprint).rename(cache / "tokens" / f"{fingerprint}.tmp")
    prepare(task, encoder, DataSettings(), cache)
    assert sorted(p.name for p in (cache / "tokens").iterdir()) == [fingerprint, f"{fingerprint}.lock"]


BROKEN = [
    b"\xef\xbb\xbf" + json.dumps(chat("q", "a")).encode() + b"\r\n",
    b'{"chat_rounds": [\n',
    b"\r\n",
    b'{"chat_rounds": "\xff"}\r\n',
    b'"text"\n',
    json.dumps({"chat_rounds": [{"role": "human", "content": 3}]}).encode() + b"\n",
    json.dumps(chat("only a question")).encode() + b"\n",
    json.dumps(chat("q", "word " * 500)).encode() + b"\n",
    json.dumps(chat("long question " * 100, "a")).encode() + b"\r\n",
    b'{"chat_rounds": [{"role": "human", "content": "\\ud800"}, {"role": "bot", "content": "a"}], "x": NaN}\n',
    json.dumps(chat("q", "b")).encode(),
]


@pytest.mark.parametrize(
    ("long_samples", "kept", "truncated", "dropped"),
    [
        (LongSamples.drop, 2, 0, {"bad row": 5, "too long": 2, "no trained token": 1}),
        (LongSamples.truncate_right, 3, 1, {"bad row": 5, "too long": 0, "no trained token": 2}),
    ],
)
def test_no_row_is_lost(tmp_path, encoder, long_samples, kept, truncated, dropped):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"".join(BROKEN))
    settings = DataSettings(seq_length=100, bad_rows=BadRows.skip, long_samples=long_samples)
    store = prepare(Task("docs", [str(file)]), encoder, settings, tmp_path / "cache")
    report = store.report
    assert (report["kept"], report["truncated"], report["dropped"]) == (kept, truncated, dropped)
    assert report["rows"] == report["kept"] + sum(report["dropped"].values()) == 10
    assert store.lengths_N.max() <= 100
    named = {d["where"]: d for d in report["first_dropped"]}
    lines = {2, 4, 5, 6, 7, 9, 10} | ({8} if long_samples == LongSamples.drop else set())
    assert set(named) == {f"{file}:{line}" for line in lines}
    assert "chat_rounds[0].content: must be text, got 3" in named[f"{file}:6"]["problem"]


def test_the_first_bad_row_stops_by_default(tmp_path, encoder):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"".join(BROKEN))
    task, cache = Task("docs", [str(file)]), tmp_path / "cache"
    with pytest.raises(UserError, match=r"x\.jsonl:2: is not JSON.*data\.bad_rows=skip") as raised:
        prepare(task, encoder, DataSettings(), cache)
    assert str(raised.value).startswith(f"{file}:2: ")
    assert not [p for p in (cache / "tokens").iterdir() if p.is_dir()]
    prepare(task, encoder, DataSettings(bad_rows=BadRows.skip), cache)
    with pytest.raises(UserError, match=r"task\.docs: 5 bad rows, e\.g\. .*x\.jsonl:2: is not JSON"):
        prepare(task, encoder, DataSettings(), cache)


def test_only_the_first_dropped_are_named(tmp_path, encoder):
    rows = [*([chat("q")] * 50), chat("q", "a")]
    store = prepare(
        Task("t", [str(write(tmp_path / "x.jsonl", rows))]), encoder, DataSettings(), tmp_path / "cache"
    )
    assert store.report["dropped"]["no trained token"] == 50 and len(store.report["first_dropped"]) == 20


def test_a_task_of_which_nothing_is_left_is_refused(tmp_path, encoder):
    task = Task("docs", [str(write(tmp_path / "x.jsonl", [chat("q" * 900, "a"), chat("q")]))])
    with pytest.raises(
        UserError, match=r"task\.docs: all 2 rows were dropped \(1 too long, 1 no trained token\)"
    ):
        prepare(task, encoder, DataSettings(seq_length=64), tmp_path / "cache")
    empty = Task("docs", [str(write(tmp_path / "empty.jsonl", []))])
    with pytest.raises(UserError, match=r"its files are empty"):
        prepare(empty, encoder, DataSettings(), tmp_path / "cache")


@pytest.mark.parametrize(
    "settings",
    [{"split": [95, 5]}, {"split": [0, 0, 0]}, {"split": [95, -5, 0]}, {"seq_length": 1}, {"limit": 0}],
)
def test_impossible_settings_are_refused(tmp_path, encoder, settings):
    with pytest.raises(UserError, match=rf"data\.{next(iter(settings))}=.* must be "):
        prepare(Task("docs", [str(tmp_path)]), encoder, DataSettings(**settings), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, encoder):
    file = write(tmp_path / "x.jsonl", ROWS[:5])
    with pytest.raises(UserError, match="cache_dir: cannot write the tokens of task docs"):
        prepare(Task("docs", [str(file)]), encoder, DataSettings(), file)


def test_other_ranks_wait_for_the_first(tmp_path, encoder):
    task, cache = Task("docs", [str(write(tmp_path / "x.jsonl", ROWS))]), tmp_path / "cache"
    got = []
    waiting = threading.Thread(
        target=lambda: got.append(prepare(task, encoder, DataSettings(), cache, first=False)), daemon=True
    )
    waiting.start()
    time.sleep(0.3)
    assert not got
    store = prepare(task, encoder, DataSettings(), cache)
    waiting.join(timeout=10)
    assert got[0].fingerprint == store.fingerprint and len(got[0]) == 200


PROCESS = """
import sys
from transformers import PreTrainedTokenizerFast
from mft.data.cache import build
from mft.data.cache.blocks import BLOCK
from mft.data.settings import DataSettings
from mft.data.cache.store import prepare
from mft.data.task import Task
from mft.data.template import Template
from mft.data.tokenize import Encoder

write = build.write
build.write = lambda *args: (print("built"), write(*args))
tokenizer, file, cache = sys.argv[1:]
encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(tokenizer), Template())
print("ready", flush=True)
sys.stdin.readline()
store = prepare(Task("docs", [file]), encoder, DataSettings(), cache)
print(store.fingerprint, len(store))
"""


def test_two_processes_build_one_store(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = write(tmp_path / "x.jsonl", ROWS * 20)
    command = [sys.executable, "-c", PROCESS, tmp_path / "tokenizer", file, tmp_path / "cache"]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    said = "".join(out for out, _ in outputs).split()
    assert said.count("built") == 1 and said.count("4000") == 2


def test_the_train_samples_of_all_tasks_are_numbered_through(make_store):
    stores = [make_store(ROWS, "a", split=[80, 20, 0]), make_store(ROWS[:30], "b", split=[80, 20, 0])]
    train, valid = Samples(stores, "train"), Samples(stores, "valid")
    assert len(train) + len(valid) == 230 and len(valid) > 20
    assert train.task_N.tolist() == sorted(train.task_N.tolist())
    for i in (0, len(train) - 1):
        sample = train.sample(i)
        assert sample.task == train.task_N[i] and len(sample.ids_S) == train.lengths_N[i]
        assert train.origin(i) == stores[sample.task].origin(sample.index)
        assert sample.ids_S.tolist() == stores[sample.task].sample(sample.index)[0].tolist()
    assert [[s.index for s in row] for row in train.load([[0, 1], []])] == [
        [train.sample(0).index, train.sample(1).index],
        [],
    ]
    assert len(Samples(stores, "test")) == 0


def test_a_limit_takes_the_first_samples_of_each_task(make_store):
    stores = [make_store(ROWS, "a"), make_store(ROWS[:3], "b", split=[1, 0, 0])]
    few, whole = Samples(stores, "train", limit=5), Samples(stores, "train")
    assert few.task_N.tolist() == [0] * 5 + [1] * 3
    assert [few.origin(i) for i in range(5)] == [whole.origin(i) for i in range(5)]


def test_the_same_rows_stay_in_their_split_when_rows_are_added(make_store):
    few, many = (
        make_store(ROWS[50:100], "few", split=[70, 20, 10]),
        make_store(ROWS, "many", split=[70, 20, 10]),
    )
    assert few.split_N.tolist() == many.split_N[50:100].tolist()


def big(tmp_path):
    """A task whose ids take several blocks."""
    return Task(
        "docs", [str(write(tmp_path / "x.jsonl", [chat(f"q {i}", f"{i} word " * 60) for i in range(900)]))]
    )


def test_a_damaged_block_is_found_when_it_is_first_read_and_the_next_start_makes_it_anew(
    tmp_path, encoder, capsys
):
    task, cache = big(tmp_path), tmp_path / "cache"
    store = prepare(task, encoder, DataSettings(), cache)
    ids = [store.sample(i)[0].tolist() for i in range(len(store))]
    folder = cache / "tokens" / store.fingerprint
    for name, block in (("ids", 0), ("ids", 1), ("trained", 0)):
        path = folder / f"{name}.bin"
        content = bytearray(path.read_bytes())
        content[block * BLOCK + 700] ^= 1
        path.write_bytes(content)
        store = prepare(task, encoder, DataSettings(), cache)  # the start does not read the tokens
        assert "damaged" not in capsys.readouterr().err
        with pytest.raises(UserError, match=rf"{name}\.bin has the checksum .* byte {block * BLOCK:,} on"):
            for i in range(len(store)):
                store.sample(i)
        if block == 1:
            assert prepare(task, encoder, DataSettings(), cache).sample(0)[0].tolist() == ids[0]
        store = prepare(task, encoder, DataSettings(), cache)
        assert [store.sample(i)[0].tolist() for i in range(len(store))] == ids
        assert "damaged" not in capsys.readouterr().err


def test_any_other_damage_is_found_at_the_start_and_the_store_made_anew_with_a_line(
    tmp_path, encoder, capsys
):
    task, cache = Task("docs", [str(write(tmp_path / "x.jsonl", ROWS[:5]))]), tmp_path / "cache"
    store = prepare(task, encoder, DataSettings(), cache)
    ids, folder = [store.sample(i)[0].tolist() for i in range(5)], cache / "tokens" / store.fingerprint
    meta = json.loads((folder / "meta.json").read_text())
    shapes = [
        "",
        "[]",
        "null",
        "{}",
        "7",
        json.dumps(meta | {"report": {}}),
        json.dumps(meta | {"sizes": None}),
    ]
    damages = [("meta.json", text.encode()) for text in shapes]
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        damages.append((path.name, content[: len(content) // 2]) if content else (path.name, b"x"))
        damages.append((path.name, None))
        if content and path.name not in ("ids.bin", "trained.bin"):
            damages.append((path.name, bytes([content[0] ^ 1]) + content[1:]))
    for name, content in damages:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        store = prepare(task, encoder, DataSettings(), cache)
        said = capsys.readouterr().err
        silent = name == "meta.json" and content is None  # as a process leaves it that was killed
        assert silent or (f"task.docs: the token cache {folder} is damaged: {name}" in said), (
            name,
            content,
            said,
        )
        assert [store.sample(i)[0].tolist() for i in range(5)] == ids and len(list(store.dropped())) == 0
