import pytest

from mft.data.settings import DataSettings, LongSamples
from mft.data.store import prepare
from mft.data.task import Task
from mft.errors import UserError
from tests.data.conftest import chat, write


@pytest.mark.parametrize("choice", ["truncate_left", "split_turns", "drop", "error"])
def test_long_samples(tmp_path, encoder, choice):
    rows = [
        chat(*[text for i in range(9) for text in (f"question {i} " * 3, "answer")], system="S"),
        chat("q" * 300, "a"),
    ]
    task = Task("t", [str(write(tmp_path / "x.jsonl", rows)), str(write(tmp_path / "y.jsonl", [chat("q", "a")]))])
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
            report["kept"] == 3 and texts[0].endswith("answer<|endoftext|>\n") and texts[1].endswith("a<|endoftext|>\n")
        )
    elif choice == "split_turns":
        assert report["kept"] == 2 and len(store) > 3 and len(set(store.split_N[:-1].tolist())) == 1
        assert all(text.startswith("<s>system\nS\n<s>human\nquestion") for text in texts[:-1])
        assert [f"question {i} " in "".join(texts) for i in range(9)] == [True] * 9
        assert "".join(texts[:-1]).count("answer<|endoftext|>") == 9
    else:
        assert report["dropped"]["too long"] == 2
