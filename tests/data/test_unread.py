"""What a format does not read is counted and named; what would be trained against the row's own word is
refused."""

import datetime

import pytest

from mft.batch import Message
from mft.data.cache.store import prepare
from mft.data.formats import KNOWN, Auto, Format, RowError
from mft.data.report import as_json, notes
from mft.data.row_fields import carries
from mft.data.settings import DataSettings
from mft.data.task import Task
from mft.errors import UserError
from tests.data.conftest import chat, write


def talk(**of_the_answer):
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"} | of_the_answer]


def pair(prompt, answer, **further):
    return {prompt: "q", answer: "a"} | further


CALL = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("name", "row", "unread"),
    [
        ("messages", {"messages": talk()}, set()),
        ("messages", {"messages": talk(reasoning_content="thought")}, {"messages[].reasoning_content"}),
        (
            "messages",
            {"messages": talk(thinking="thought", name="x")},
            {"messages[].thinking", "messages[].name"},
        ),
        ("messages", {"messages": talk(tool_calls=CALL), "tools": CALL}, {"messages[].tool_calls", "tools"}),
        ("messages", {"messages": talk(function_call={"name": "f"}), "images": [b"\x89PNG"]}, None),
        ("messages", {"messages": talk(train=False, weight=0, loss_mask=0, tool_calls=None, name="")}, set()),
        ("messages", {"messages": talk(tool_calls=[], function_call={"name": None})}, set()),
        (
            "messages",
            {"messages": talk(content=[{"type": "text", "text": "a", "cache_control": {"type": "x"}}])},
            None,
        ),
        ("messages", {"messages": talk(), "text": "rendered", "prompt": "q"}, {"text", "prompt"}),
        ("messages", {"messages": talk(), "loss_mask": [0, 1], "weight": 0.5}, {"loss_mask", "weight"}),
        ("chat", chat("q", "a") | {"data_name": "x", "score": 0.5, "id": 7, "ok": True}, {"data_name"}),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}], "system": "s", "mask": "User"},
            {"mask"},
        ),
        ("question_answer", pair("question", "answer", context="lost", system="s"), {"context"}),
        ("instruction_response", pair("instruction", "response", context="lost", input="i"), {"context"}),
        ("instruction_output", pair("instruction", "output", history=[["q", "a"]]), {"history"}),
        ("question_response", pair("question", "response", system_prompt="lost"), {"system_prompt"}),
        ("prompt_answer", pair("prompt", "answer", train=True, weight=0, loss_mask=1), {"weight"}),
        ("prompt_completion", pair("prompt", "completion", text="whole"), {"text"}),
        ("text", {"text": "t", "when": datetime.date(2026, 1, 1), "meta": {"url": "x"}}, {"when", "meta"}),
    ],
)
def test_formats_name_what_they_leave_unread(name, row, unread):
    KNOWN[name].messages(row)
    if unread is None:  # beside others
        unread = {
            "function_call" in str(row) and "messages[].function_call",
            "images" in row and "images",
            "cache_control" in str(row) and "messages[].content[].cache_control",
        } - {False}
    assert set(KNOWN[name].unread(row)) == unread


@pytest.mark.parametrize("value", ["x", [1], {"a": 0}, b"x", datetime.date(2026, 1, 1), [[None], ["x"]]])
def test_text_lists_and_objects_carry_something(value):
    assert carries(value)


@pytest.mark.parametrize("value", [None, 0, 1.5, True, "", [], {}, [None, [""]], {"a": None, "b": {"c": []}}])
def test_numbers_and_what_is_empty_carry_nothing(value):
    assert not carries(value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"mask": 1}, "messages[1].mask"),
        ({"mask": False}, "messages[1].mask"),
        ({"loss": False}, "messages[1].loss"),
        ({"loss_scale": 0.3}, "messages[1].loss_scale"),
        ({"loss_mask": 0.3}, "messages[1].loss_mask"),
        ({"loss_mask": [0, 1]}, "messages[1].loss_mask"),
    ],
)
def test_answers_whose_loss_is_unclear_are_refused(fields, field):
    with pytest.raises(RowError) as raised:
        KNOWN["messages"].messages({"messages": talk(**fields)})
    assert raised.value.field == field


@pytest.mark.parametrize("fields", [{"train": False}, {"loss_mask": 0}, {"loss_mask": False}])
def test_a_conversation_that_asks_for_no_loss_beside_its_turns_is_refused(fields):
    with pytest.raises(RowError, match=f"{next(iter(fields))}: is not read beside messages"):
        KNOWN["messages"].messages({"messages": talk()} | fields)
    assert not KNOWN["prompt_answer"].messages(pair("prompt", "answer", **fields))[-1].train


def test_clear_words_about_the_loss_are_read():
    for fields in ({"train": False}, {"weight": 0}, {"loss_mask": 0}, {"loss_mask": False}):
        assert not KNOWN["messages"].messages({"messages": talk(**fields)})[-1].train
    for fields in ({"loss": True}, {"loss_scale": 1.0}, {"loss_mask": 1}, {"mask": 0, "train": False}):
        assert KNOWN["messages"].messages({"messages": talk(**fields)})[-1].train is ("train" not in fields)


def test_the_report_names_fields_and_counts_rows(make_store):
    rows = [{"id": f"n{i}", "messages": talk(content=f"a{i}")} for i in range(9)]
    rows[3]["tools"] = rows[4]["tools"] = CALL
    rows[5]["messages"][1]["thinking"] = "so"
    rows[6]["loss_mask"] = [0, 0]
    rows[7]["messages"] += talk(train=False)
    rows[8]["messages"][1]["\x1b[31m"] = "x"
    a, b = make_store(rows, "a"), make_store([pair("prompt", "answer", source="web")], "b")
    assert as_json([a, b], ["a", "b"])["a"]["unread"]["tools"] == 2
    said = notes([a, b], ["a", "b"])
    assert said[0].startswith("a: not read: tools (2 rows), loss_mask (1 rows), ") and "\x1b" not in said[0]
    assert "messages[].thinking (1 rows)" in said[0]
    assert said[1].startswith("a: loss_mask may say what carries loss, but is not read there")
    assert said[2:] == [
        "a: 1 answers carry no loss, by their train, weight or loss_mask",
        "labels that are not read: id (9 rows), source (1 rows)",
    ]


def test_rows_with_keys_of_their_own_do_not_fill_the_memory(make_store):
    store = make_store([pair("prompt", "answer", **{f"key{i}": "x"}) for i in range(500)])
    assert len(store.report["unread"]) == 201 and store.report["unread"]["other fields"] == 300
    assert len(notes([store], ["a"])[0]) < 500


class Undeclared(Format):
    def messages(self, row):
        return [Message("user", row["q"]), Message("assistant", row["a"])]


def test_a_format_that_does_not_say_what_it_reads_is_named(tmp_path, encoder):
    file = write(tmp_path / "x.jsonl", [{"q": "q", "a": "a", "lost": "x"}])
    store = prepare(Task("t", [str(file)], format=Undeclared()), encoder, DataSettings(), tmp_path / "cache")
    assert notes([store], ["t"])[0].startswith("t: its format does not say which fields")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (pair("prompt", "completion", text="q a"), "prompt_completion"),
        (pair("question", "answer", text="q a"), "question_answer"),
        (pair("instruction", "output", text="q a"), "instruction_output"),
        ({"messages": talk(), "text": "q a"}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}], "text": "q a"}, "sharegpt"),
        ({"text": "t", "title": "x"}, "text"),
        ({"text": "t", "problem": None, "solution": ""}, "text"),
    ],
)
def test_a_text_beside_a_conversation_is_not_what_is_trained(tmp_path, row, name):
    assert Task("t", [str(write(tmp_path / "x.jsonl", [row]))]).find_format()[0] == name


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "q a", "problem": "q", "solution": "a"}, "a text beside problem and solution"),
        ({"text": "q a", "prompt": "q", "output": "a"}, "a text beside prompt and output"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preferences"),
        ({"chosen": talk(), "rejected": talk()}, "preferences"),
        ({"prompt": "q", "response": "a", "chosen": "a", "rejected": "b"}, "preferences"),
        ({"messages": talk(), "chosen": talk(), "rejected": talk()}, "preferences"),
        ({"text": "t", "chosen": "a", "rejected": "b"}, "preferences"),
        ({"prompt": "q", "completion": "a", "label": False}, "judged completions"),
    ],
)
def test_rows_that_auto_would_misread_are_refused(tmp_path, row, says):
    task = Task("t", [str(write(tmp_path / "x.jsonl", [row]))], format=Auto())
    with pytest.raises(UserError, match=rf"task\.t: its rows (are|have) {says}"):
        task.find_format()
