import json
from pathlib import Path

import pytest

from mft.batch import IGNORE, Message, Sample
from mft.data.detection import recognise
from mft.data.packing import Pack
from mft.data.template import OWN, Template
from mft.data.template_choice import adopt, named, of_tokenizer
from mft.data.tokenize import Encoder
from mft.errors import UserError
from tests.data.conftest import CHATML, TALK, text_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "templates"
CASES = json.loads((FIXTURES / "mftcoder_template.json").read_text(encoding="utf-8"))
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
    text = text_of(Template(), CONVERSATION[:3], "</s>")
    assert text == "<s>system\nBe short.\n<s>human\ndef f(x):<s>bot\n    return x</s>\n"
    assert (
        text_of(Template(), CONVERSATION[:2], "</s>", generation=True)
        == "<s>system\nBe short.\n<s>human\ndef f(x):<s>bot\n"
    )


def test_only_targets_and_their_end_carry_loss():
    segments = Template().segments(CONVERSATION)
    assert [p.text for p in segments if p.trained] == ["    return x"]
    assert [p.text for p in segments if p.eos] == ["    return x", "  \n"]
    assert segments[0].text.endswith("<s>bot\n")


@pytest.mark.parametrize("markers", [None, MARKERS, {"assistant": ""}])
@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("generation", [False, True])
def test_the_saved_chat_template_renders_the_same_text(tokenizer, markers, turns, generation):
    template = Template(markers)
    messages = CONVERSATION[:turns]
    rendered = tokenizer.apply_chat_template(
        plain(messages), chat_template=template.jinja(), tokenize=False, add_generation_prompt=generation
    )
    assert rendered == text_of(template, messages, tokenizer.eos_token, generation)


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
    with pytest.raises(
        UserError, match=r"data\.role_markers: unknown role 'asistant'.*did you mean assistant"
    ):
        Template({"asistant": "x"})
    with pytest.raises(UserError, match="human and user are the same role"):
        Template({"human": "x", "user": "y"})
    with pytest.raises(UserError, match=r"data\.role_markers\.bot: 3 is not text"):
        Template({"bot": 3})
    with pytest.raises(
        UserError, match=r"unknown template 'mtf'; allowed: mft, mftcoder, .*did you mean mft"
    ):
        named("mtf")
    assert named("mft", {"bot": "B"}).markers["assistant"] == "B"


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c["row"]))
def test_mftcoder_feeds_what_the_original_feeds(case):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FIXTURES)
    _, fmt = recognise(case["row"], "t")
    template = named("mftcoder", case["role_markers"])
    ids_S, trained_S = Encoder(tokenizer, template).encode(fmt.messages(case["row"]))
    assert ids_S.tolist() == case["expected"]["input_ids"]
    assert trained_S.astype(int).tolist() == case["expected"]["loss_mask"]
    assert text_of(template, fmt.messages(case["row"]), tokenizer.eos_token) == case["expected"]["text"]


@pytest.mark.parametrize("name", ["mft", "mftcoder", OWN])
def test_the_contract_of_templates(kind, name):
    tokenizer = kind
    tokenizer.chat_template = CHATML
    template = named(name, None, tokenizer)
    adopt(tokenizer, template)
    encoder = Encoder(tokenizer, template)
    plain = [{"role": m.role, "content": m.content} for m in TALK]
    rendered = tokenizer.apply_chat_template(plain, tokenize=False)
    assert rendered == text_of(template, TALK, tokenizer.eos_token)
    ids_S, trained_S = encoder.encode(TALK)
    for turns in (2, 4):
        prompt = encoder.encode_prompt(TALK[:turns])
        assert prompt == ids_S[: len(prompt)].tolist()
        assert trained_S[len(prompt)], "what follows the prompt is what is learned"
        asked = tokenizer.apply_chat_template(plain[:turns], tokenize=False, add_generation_prompt=True)
        assert asked == text_of(template, TALK[:turns], tokenizer.eos_token, generation=True)
        assert Encoder(tokenizer, of_tokenizer(tokenizer)).encode_prompt(TALK[:turns]) == prompt
    assert (ids_S[trained_S] == tokenizer.eos_token_id).sum() == 2, (
        "every answer ends with a trained end of turn"
    )
    if tokenizer.bos_token_id is not None and name == OWN:
        assert (ids_S == tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize("name", ["mft", "mftcoder", OWN])
def test_a_tokenizer_without_an_end_is_refused_with_a_hint(kind, name):
    kind.chat_template = CHATML
    kind.eos_token = None
    with pytest.raises(
        UserError, match=r"model\.eos_token: the tokenizer has no end-of-sequence token.*e\.g\. model"
    ):
        Encoder(kind, named(name, None, kind))


@pytest.mark.parametrize("name", ["mft", "mftcoder", OWN])
def test_no_beginning_comes_twice(kind, name):
    """A tokenizer that puts its BOS before every text must not repeat it before every segment."""
    kind.chat_template = CHATML if kind.bos_token else CHATML.replace("{{ bos_token }}", "")
    template = named(name, None, kind)
    ids_S, _ = Encoder(kind, template).encode(TALK)
    written = text_of(template, TALK, str(kind.eos_token)).count(kind.bos_token) if kind.bos_token else 0
    assert (ids_S == kind.bos_token_id).sum() == written
    assert not ((ids_S[1:] == kind.bos_token_id) & (ids_S[:-1] == kind.bos_token_id)).any()


@pytest.mark.parametrize("name", ["mft", "mftcoder", OWN])
def test_the_end_is_learned_where_it_is_the_padding_too(kind, name):
    kind.chat_template = CHATML
    template = named(name, None, kind)
    adopt(kind, template)
    kind.pad_token = kind.eos_token
    encoder = Encoder(kind, template)
    rows = [[Sample(*encoder.encode(TALK[:n]), task=0)] for n in (5, 3)]
    batch = Pack().collate(rows, kind.pad_token_id, 512)
    assert (batch.target_BT == kind.eos_token_id).sum(1).tolist() == [2, 1], (
        "every end of a bot turn is a target"
    )
    padding_BT = batch.sample_BT == -1
    assert padding_BT[1].any() and (batch.target_BT[padding_BT] == IGNORE).all()
    assert (batch.ids_BT[padding_BT] == kind.eos_token_id).all()
