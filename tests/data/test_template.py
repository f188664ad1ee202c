import pytest

from mft.batch import Message
from mft.data.template import Template, named
from mft.data.tokenize import Encoder
from mft.errors import UserError

CONVERSATION = [
    Message("system", "Be short."),
    Message("user", "def f(x):"),
    Message("assistant", "    return x"),
    Message("user", "\nMore {{ x }} {% if %} '\"\\ größer 長 \n"),
    Message("assistant", "  \n", train=False),
]
MARKERS = {"system": "### 'S'\n", "human": '{% "U" }}\\ \U0001f600\t\n', "bot": "### B: é\u2028\n"}


def plain(messages):
    return [{"role": m.role, "content": m.content} for m in messages]


def test_the_text_is_the_documented_one():
    text = Template().text(CONVERSATION[:3], "</s>")
    assert text == "<s>system\nBe short.\n<s>human\ndef f(x):<s>bot\n    return x</s>\n"
    assert Template().prompt(CONVERSATION[:2], "</s>") == "<s>system\nBe short.\n<s>human\ndef f(x):<s>bot\n"


def test_only_targets_and_their_end_carry_loss():
    pieces = Template().pieces(CONVERSATION)
    assert [p.text for p in pieces if p.trained] == ["    return x"]
    assert [p.text for p in pieces if p.eos] == ["    return x", "  \n"]
    assert pieces[0].text.endswith("<s>bot\n")


@pytest.mark.parametrize("markers", [None, MARKERS, {"assistant": ""}])
@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("generation", [False, True])
def test_the_saved_chat_template_renders_the_same_text(tokenizer, markers, turns, generation):
    template = Template(markers)
    messages = CONVERSATION[:turns]
    rendered = tokenizer.apply_chat_template(
        plain(messages), chat_template=template.jinja(), tokenize=False, add_generation_prompt=generation
    )
    assert rendered == template.text(messages, tokenizer.eos_token, generation)


def test_the_saved_chat_template_takes_the_other_names_and_refuses_unknown_ones(tokenizer):
    rows = [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]
    jinja = Template().jinja()
    text = tokenizer.apply_chat_template(rows, chat_template=jinja, tokenize=False)
    assert text == "<s>human\nq<s>bot\na<|endoftext|>\n"
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "q"}], chat_template=jinja, tokenize=False)


def test_markers_reach_the_ids(tokenizer):
    encoder = Encoder(tokenizer, Template({"bot": "A: "}))
    assert tokenizer.decode(encoder.encode_prompt([Message("user", "q")])) == "<s>human\nqA: "


def test_wrong_markers_and_names_are_refused():
    with pytest.raises(UserError, match=r"data\.role_markers: unknown role 'asistant'.*did you mean assistant"):
        Template({"asistant": "x"})
    with pytest.raises(UserError, match="human and user are the same role"):
        Template({"human": "x", "user": "y"})
    with pytest.raises(UserError, match=r"data\.role_markers\.bot: 3 is not text"):
        Template({"bot": 3})
    with pytest.raises(UserError, match=r"unknown template 'mtf'; allowed: mft, mftcoder, .*did you mean mft"):
        named("mtf")
    assert named("mft", {"bot": "B"}).markers["assistant"] == "B"
