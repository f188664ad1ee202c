import copy

import pytest

from mft.batch import Message
from mft.data.cache.store import prepare
from mft.data.report import notes
from mft.data.settings import DataSettings
from mft.data.task import Task
from mft.data.template import OWN
from mft.data.template_choice import adopt, named
from mft.data.tokenize import Encoder
from mft.errors import UserError
from tests.data.conftest import CHATML, TALK, write


def test_own_templates_learn_answers_and_their_end_only(kinds):
    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = CHATML.replace("{{ bos_token }}", "")
    template = named(OWN, None, tokenizer)
    adopt(tokenizer, template)
    assert tokenizer.eos_token == "<|im_end|>"
    trained = [segment for segment in template.segments(TALK) if segment.trained]
    assert [(segment.text, segment.eos) for segment in trained] == [
        ("    return w * h\n", True),
        ("<im", True),
    ]


def test_templates_that_cannot_teach_are_refused(kinds, tmp_path):
    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        named(OWN, None, tokenizer)
    file = tmp_path / "endless.jinja"
    file.write_text(
        CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "#").replace("{{ bos_token }}", "")
    )
    with pytest.raises(UserError, match="writes no end-of-turn token"):
        named(str(file), None, tokenizer)
    file.write_text(
        CHATML.replace("assistant\n{% endif", "assistant\nThink: {% endif").replace("{{ bos_token }}", "")
    )
    with pytest.raises(UserError, match="begins answers without its generation prompt"):
        named(str(file), None, tokenizer)
    with pytest.raises(UserError, match="no such file"):
        named("gone.jinja", None, tokenizer)
    with pytest.raises(UserError, match="role_markers: has no effect"):
        named(str(file), {"user": "x"}, tokenizer)


def thinking(before: str, prompt: str = "") -> str:
    """A template that writes `before` in front of the last answer; `prompt` is the part that its prompt
    opens."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}"
        + before
        + "{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n" + prompt + "{% endif %}"
    )


def trained(template, *turns: Message) -> list[str]:
    return [segment.text for segment in template.segments(turns) if segment.trained]


@pytest.mark.parametrize(
    ("before", "prompt"),
    [
        ("<think>\n\n</think>\n\n", ""),
        ("<think></think>", ""),
        ("<think>\n</think>\n", ""),
        ("\n<seed:think></seed:think>\n", ""),
        ("[THINK][/THINK]", ""),
        ("<|START_THINKING|><|END_THINKING|>", ""),
        ("<think>\n\n</think>\n\n", "<think>\n"),
        ("<think></think>", "<think>"),
    ],
)
def test_an_empty_thought_of_the_template_carries_no_loss(kinds, before, prompt):
    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = thinking(before, prompt)
    template = named(OWN, None, tokenizer)
    encoder = Encoder(tokenizer, template)
    talk = (Message("user", "q"), Message("assistant", "two"))
    assert trained(template, *talk) == ["two<|im_end|>"]
    segments = template.segments(talk)
    assert "".join(segment.text for segment in segments) == tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in talk], tokenize=False
    )
    assert [segment.thought for segment in segments].count(True) == 1
    ids = encoder.encode(talk)[0].tolist()
    asked = encoder.encode_prompt(talk[:1])
    assert ids[: len(asked)] == asked
    if not prompt:  # else earlier answers do not begin as the prompt does, which is refused
        assert trained(template, *talk, Message("user", "r"), Message("assistant", "b")) == [
            "two<|im_end|>",
            "b<|im_end|>",
        ]


@pytest.mark.parametrize(
    "content", ["<think>\n\n</think>\n\ntwo", "<think></think>two", "<think>\nso\n</think>\ntwo"]
)
def test_a_thought_of_the_row_is_trained(kinds, content):
    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = thinking("")
    template = named(OWN, None, tokenizer)
    assert trained(template, Message("user", "q"), Message("assistant", content)) == [content + "<|im_end|>"]


def test_what_a_template_writes_before_an_answer_is_trained_where_it_says_something(kinds):
    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = thinking("<think>\nshort\n</think>\n")
    template = named(OWN, None, tokenizer)
    found = trained(template, Message("user", "q"), Message("assistant", "two"))
    assert found == ["<think>\nshort\n</think>\ntwo<|im_end|>"]


def test_empty_thoughts_are_counted_and_reported(kinds, tmp_path):
    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = thinking("<think></think>")
    encoder = Encoder(tokenizer, named(OWN, None, tokenizer))
    file = write(tmp_path / "x.jsonl", [{"prompt": f"q{i}", "answer": "a"} for i in range(3)])
    store = prepare(Task("t", [str(file)]), encoder, DataSettings(), tmp_path / "cache")
    assert "t: the template puts an empty thought before 3 answers, without loss" in notes([store], ["t"])
