import pytest

from mft.data.cache.store import prepare
from mft.data.report import tables
from mft.data.settings import DataSettings, LongSamples
from mft.data.task import Task
from mft.errors import UserError
from tests.data.conftest import chat, write


@pytest.mark.parametrize("choice", ["truncate_left", "split_turns", "drop", "error"])
def test_long_samples(tmp_path, encoder, choice):
    rows = [
        chat(*[text for i in range(9) for text in (f"question {i} " * 3, "answer")], system="S"),
        chat("q" * 300, "a"),
    ]
    task = Task(
        "t", [str(write(tmp_path / "x.jsonl", rows)), str(write(tmp_path / "y.jsonl", [chat("q", "a")]))]
    )
    settings = DataSettings(seq_length=120, long_samples=LongSamples(choice))
    if choice == "error":
        with pytest.raises(UserError, match=r"x\.jsonl:1: \d+ tokens, data\.seq_length is 120"):
            prepare(task, encoder, settings, tmp_path / "cache")
        return
    store = prepare(task, encoder, settings, tmp_path / "cache")
    report = store.report
    assert report["rows"] == 3 == report["kept"] + sum(report["dropped"].values())
    assert store.lengths_N.max() <= 120 and len(store) == report["samples"] == sum(report["splits"].values())
    texts = [encoder.tokenizer.decode(store.sample(i)[0]) for i in range(len(store))]
    if choice == "truncate_left":
        assert (
            report["kept"] == 3
            and texts[0].endswith("answer<|endoftext|>\n")
            and texts[1].endswith("a<|endoftext|>\n")
        )
    elif choice == "split_turns":
        assert report["kept"] == 2 and len(store) > 3 and len(set(store.split_N[:-1].tolist())) == 1
        assert all(text.startswith("<s>system\nS\n<s>human\nquestion") for text in texts[:-1])
        assert [f"question {i} " in "".join(texts) for i in range(9)] == [True] * 9
        assert "".join(texts[:-1]).count("answer<|endoftext|>") == 9
    else:
        assert report["dropped"]["too long"] == 2


def test_what_split_turns_leaves_of_a_row_is_counted(make_store):
    """Three rounds of which the middle one is too long, and a last part that is a question only."""
    rows = [
        chat("q1", "a1", "q2 " * 60, "a2", "q3", "a3"),
        chat("x " * 20, "y", "x " * 20, "y", "x " * 28),
        chat("q4 " * 60, "a4"),
    ]
    store = make_store(rows, seq_length=80, long_samples="split_turns", split=[1, 0, 0])
    report = store.report
    assert (report["rows"], report["kept"], report["dropped"]["too long"]) == (3, 2, 1)
    assert (report["rounds_left_out"], report["parts_left_out"]) == (1, 1)
    assert report["samples"] == len(store)
    lost = [str(cell) for cell in tables([store], ["docs"])[0].columns[-1].cells]
    assert lost == ["1 too long, 2 truncated, 1 rounds left out, 1 parts left out"]
