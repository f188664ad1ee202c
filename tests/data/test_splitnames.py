"""Files that are named for validation or test are never trained."""

from pathlib import Path

import pytest

from mft.data.cache.store import prepare
from mft.data.report import as_json, notes
from mft.data.settings import DataSettings
from mft.data.split import split_named
from mft.data.task import Task
from mft.errors import UserError
from tests.data.conftest import write


def rows(word: str, n: int) -> list[dict]:
    return [{"prompt": f"{word} {i}", "answer": f"{word} {i}"} for i in range(n)]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", ""),
        ("data/test-00000-of-00001.jsonl", "test"),
        ("validation.jsonl", "valid"),
        ("my.dataset_dev.jsonl.gz", "valid"),
        ("val 1.jsonl", "valid"),
        ("gsm8k-test-v2.jsonl", "test"),
        ("TEST.jsonl", "test"),
        ("eval/a.jsonl", "test"),
        ("testing/en/a.jsonl", "test"),
        ("de/valid/a.jsonl", "valid"),
        ("test/train.jsonl", ""),  # the file's own name decides
        ("test/train/a.jsonl", ""),
        ("a.jsonl", ""),
        ("contest.jsonl", ""),
        ("latest-devices.jsonl", ""),
        ("testament/medieval.jsonl", ""),
        ("test1.jsonl", "test"),
    ],
)
def test_the_words_of_the_hubs_convention_name_a_split(path, split):
    assert split_named(Path(path)) == split


def test_a_name_of_several_splits_is_refused(tmp_path):
    write(tmp_path / "train-test.jsonl", rows("a", 3))
    with pytest.raises(UserError, match=r"train-test\.jsonl' names several splits; rename it"):
        Task("t", [str(tmp_path)]).files()
    assert Task("t", [str(tmp_path / "train-test.jsonl")]).splits() == [""]


@pytest.fixture
def hub(tmp_path) -> Path:
    """A folder as the hub lays it out."""
    for name, n in (("train", 30), ("validation", 4), ("test", 10)):
        write(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.jsonl", rows(name, n))
    return tmp_path / "hub"


def splits(tmp_path, encoder, *paths, valid=(), **settings) -> dict[str, int]:
    task = Task("t", list(map(str, paths)), list(map(str, valid)))
    return prepare(task, encoder, DataSettings(**settings), tmp_path / "cache").report["splits"]


@pytest.mark.parametrize("split", [[95, 5, 0], [100, 0, 0], [50, 25, 25]])
def test_files_of_a_split_take_its_part(tmp_path, encoder, hub, split):
    assert splits(tmp_path, encoder, hub, split=split) == {"train": 30, "valid": 4, "test": 10}


def test_a_split_without_files_keeps_its_part_of_the_others(tmp_path, encoder, hub):
    (hub / "data" / "validation-00000-of-00001.jsonl").unlink()
    found = splits(tmp_path, encoder, hub, split=[50, 50, 0])
    assert found["test"] == 10 and found["train"] + found["valid"] == 30 and found["valid"] > 5


def test_unnamed_files_train_beside_named_ones_and_given_ones_always(tmp_path, encoder, hub):
    write(hub / "more.jsonl", rows("more", 5))
    test = hub / "data" / "test-00000-of-00001.jsonl"
    assert splits(tmp_path, encoder, hub, split=[1, 0, 0]) == {"train": 35, "valid": 4, "test": 10}
    assert splits(tmp_path, encoder, test, split=[1, 0, 0]) == {"train": 10, "valid": 0, "test": 0}


def test_valid_is_joined_by_files_named_for_validation_and_wins_over_names(tmp_path, encoder, hub):
    mine = write(tmp_path / "mine.jsonl", rows("mine", 3))
    assert splits(tmp_path, encoder, hub, valid=[mine]) == {"train": 30, "valid": 7, "test": 10}
    test = hub / "data" / "test-00000-of-00001.jsonl"
    assert splits(tmp_path, encoder, hub, valid=[test]) == {"train": 30, "valid": 14, "test": 0}


def test_a_folder_without_anything_to_train_is_refused(tmp_path):
    write(tmp_path / "h" / "test.jsonl", rows("a", 3))
    write(tmp_path / "h" / "dev" / "a.jsonl", rows("a", 3))
    task = Task("t", [str(tmp_path / "h")])
    with pytest.raises(UserError, match=r"task\.t\.paths: no file to train on.*give the files themselves"):
        task.splits()
    write(tmp_path / "g.jsonl", rows("b", 3))
    assert Task("t", [str(tmp_path / "h"), str(tmp_path / "g.jsonl")]).splits() == ["valid", "test", ""]


def test_the_report_names_what_is_held_out(tmp_path, encoder, hub):
    write(hub / "data" / "test-00001-of-00001.jsonl", [*rows("x", 2), *rows("x", 2)])
    settings = DataSettings(duplicates="drop")
    store = prepare(Task("t", [str(hub)]), encoder, settings, tmp_path / "cache")
    (said,) = notes([store], ["t"])
    assert said == (
        "t: held out, never trained: "
        "test-00000-of-00001.jsonl (test, 10 rows), test-00001-of-00001.jsonl (test, 4 rows), "
        "validation-00000-of-00001.jsonl (valid, 4 rows)"
    )
    files = as_json([store], ["t"])["t"]["held_out_files"]
    assert files[0] == {"file": str(hub / "data" / "test-00000-of-00001.jsonl"), "split": "test", "rows": 10}


def test_the_splits_enter_the_fingerprint_and_plain_names_do_not(tmp_path, hub):
    def fingerprint(*paths, valid=()):
        return Task("t", list(map(str, paths)), list(map(str, valid))).fingerprint(tmp_path / "cache")

    before, data = fingerprint(hub), hub / "data"
    (data / "test-00000-of-00001.jsonl").rename(data / "test.jsonl")
    assert fingerprint(hub) == before
    (data / "test.jsonl").rename(data / "tested.jsonl")
    assert fingerprint(hub) != before
    (data / "tested.jsonl").unlink()
    train, valid = data / "train-00000-of-00001.jsonl", data / "validation-00000-of-00001.jsonl"
    assert fingerprint(hub) == fingerprint(train, valid=[valid]) != fingerprint(train, valid)
