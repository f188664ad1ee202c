import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft.batch import Message
from mft.data.formats import KNOWN, Chat, RowError
from tests.data.conftest import chat


def test_both_sets_of_roles_and_other_fields():
    rounds = [("system", "s"), ("human", "q"), ("bot", "a"), ("user", "r"), ("assistant", "b")]
    row = {
        "id": math.nan,
        "chat_rounds": [{"role": role, "content": text, "time": 1} for role, text in rounds],
    }
    assert Chat().messages(row) == [
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "r"),
        Message("assistant", "b"),
    ]


def test_a_turn_can_be_left_out_of_the_loss():
    row = chat("q", "a", "r", "b")
    row["chat_rounds"][1]["train"] = False
    assert [m.train for m in Chat().messages(row)] == [True, False, True, True]


def rounds(*turns):
    return {"chat_rounds": [dict(zip(("role", "content"), turn, strict=False)) for turn in turns]}


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ([1], "", "must be an object with the field chat_rounds, got [1]"),
        (None, "", "got null"),
        ({}, "chat_rounds", "is missing; the row's fields: 'none'"),
        ({"chat_round": []}, "chat_rounds", "did you mean chat_round?"),
        ({"chat_rounds": "x"}, "chat_rounds", "must be a list of at least one round, got 'x'"),
        ({"chat_rounds": []}, "chat_rounds", "at least one round"),
        ({"chat_rounds": [3]}, "chat_rounds[0]", "must be an object with the field role, got 3"),
        (rounds(("human",)), "chat_rounds[0].content", "is missing; the round's fields: 'role'"),
        (rounds(("human", None)), "chat_rounds[0].content", "must be text, got null"),
        (rounds((["human"], "q")), "chat_rounds[0].role", "must be text, got ['human']"),
        (
            rounds(("human", "q"), ("bto", "a")),
            "chat_rounds[1].role",
            "'bto' is not allowed here; allowed: bot, assistant",
        ),
        (rounds(("human", "q"), ("bto", "a")), "chat_rounds[1].role", "did you mean bot?"),
        (rounds(("human", "q"), ("user", "a")), "chat_rounds[1].role", "human and bot turns alternate"),
        (rounds(("bot", "a")), "chat_rounds[0].role", "allowed: system, human, user"),
        (
            rounds(("human", "q"), ("bot", "a"), ("system", "s")),
            "chat_rounds[2].role",
            "allowed: human, user",
        ),
        (rounds(("system", "s"), ("system", "s")), "chat_rounds[1].role", "allowed: human, user"),
        (rounds(("system", "s")), "chat_rounds", "holds only a system turn"),
        (rounds(("human", "q"), ("bot", "")), "chat_rounds[1].content", "is empty"),
        (rounds(("human", "a\ud800")), "chat_rounds[0].content", "half of a surrogate pair at character 1"),
        (
            {"chat_rounds": [{"role": "human", "content": "q", "train": 0}]},
            "chat_rounds[0].train",
            "must be true or false, got 0",
        ),
    ],
)
def test_wrong_rows_name_the_field(row, field, says):
    with pytest.raises(RowError) as raised:
        Chat().messages(row)
    assert raised.value.field == field
    assert says in str(raised.value)
    assert len(str(raised.value)) < 300


def test_long_values_are_shortened():
    with pytest.raises(RowError) as raised:
        Chat().messages({"chat_rounds": "x" * 10_000})
    assert len(str(raised.value)) < 200


LEAF = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["human", "bot", "system", "user"])
)
KEYS = st.sampled_from(["chat_rounds", "role", "content", "train", "id"])
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4)
)
TURN = st.dictionaries(st.sampled_from(["role", "content"]), LEAF) | JSON


@settings(max_examples=300, deadline=None)
@given(JSON | st.fixed_dictionaries({"chat_rounds": st.lists(TURN, max_size=4) | JSON}))
def test_any_row_becomes_messages_or_a_row_error(row):
    try:
        messages = Chat().messages(row)
    except RowError as error:
        assert str(error)
    else:
        assert messages and all(isinstance(m.content, str) for m in messages)


@pytest.mark.parametrize("name", [n for n, f in KNOWN.items() if hasattr(f, "prompt")])
def test_pairs(name):
    fmt = KNOWN[name]
    row = {fmt.prompt: "q", fmt.answer: "a", "system": "s"} | ({fmt.input: "more"} if fmt.input else {})
    question = "q\nmore" if fmt.input else "q"
    expected = [("system", "s"), ("user", question), ("assistant", "a")]
    assert [(m.role, m.content) for m in fmt.messages(row)] == expected
    with pytest.raises(RowError, match=f"{fmt.answer}: is empty"):
        fmt.messages({fmt.prompt: "q", fmt.answer: ""})


def test_weights_parts_and_names_of_the_other_turns():
    openai = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "weight": 0},
        ]
    }
    assert KNOWN["messages"].messages(openai) == [Message("user", "ab"), Message("assistant", "c", False)]
    openai["messages"][1]["weight"] = 0.5
    with pytest.raises(RowError, match=r"messages\[1\]\.weight: must be 0 \(no loss\) or 1, got 0.5"):
        KNOWN["messages"].messages(openai)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    shared = KNOWN["sharegpt"].messages({"system": "s", "conversations": turns})
    assert [m.role for m in shared] == ["system", "user", "assistant"]
