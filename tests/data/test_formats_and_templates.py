"""Formats settled once for a task, and the templates beside `mft`: exact ids, one text, prompts that are prefixes."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from mft.batch import Message
from mft.data.formats import KNOWN, Auto, RowError
from mft.data.settings import BadRows, DataSettings, LongSamples
from mft.data.store import prepare
from mft.data.task import Task
from mft.data.template import OWN, adopt, named, of_tokenizer
from mft.data.tokenize import Encoder
from mft.errors import UserError
from tests.data.conftest import chat, write

FIXTURES = Path(__file__).parents[1] / "fixtures" / "templates"
CASES = json.loads((FIXTURES / "mftcoder_template.json").read_text(encoding="utf-8"))
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    Message("system", "Be short."),
    Message("user", "def area(w, h):\n"),
    Message("assistant", "    return w * h\n"),
    Message("user", "größer?"),
    Message("assistant", "<im"),
]


def metaspace(bos: bool):
    """A sentencepiece-like tokenizer: blanks are ▁, one is put before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    backend.train_from_iterator(
        ["def area of a\n"] * 9, trainers.BpeTrainer(special_tokens=[*special, *bytes_], vocab_size=300)
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def kinds(tokenizer):
    import copy

    byte_level = copy.deepcopy(tokenizer)
    byte_level.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return {"bytes": byte_level, "metaspace": metaspace(False), "metaspace+bos": metaspace(True)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c["row"]))
def test_mftcoder_feeds_what_the_original_feeds(case):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FIXTURES)
    _, fmt = Auto().settled(case["row"])
    template = named("mftcoder", case["role_markers"])
    ids_S, trained_S = Encoder(tokenizer, template).encode(fmt.messages(case["row"]))
    assert ids_S.tolist() == case["expected"]["input_ids"]
    assert trained_S.astype(int).tolist() == case["expected"]["loss_mask"]
    assert template.text(fmt.messages(case["row"]), tokenizer.eos_token) == case["expected"]["text"]


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "metaspace+bos"])
@pytest.mark.parametrize("name", ["mft", "mftcoder", OWN])
def test_the_contract_of_templates(kinds, kind, name):
    import copy

    tokenizer = copy.deepcopy(kinds[kind])
    tokenizer.chat_template = CHATML
    template = named(name, None, tokenizer)
    adopt(tokenizer, template)
    encoder = Encoder(tokenizer, template)
    plain = [{"role": m.role, "content": m.content} for m in TALK]
    rendered = tokenizer.apply_chat_template(plain, tokenize=False)
    assert rendered == template.text(TALK, tokenizer.eos_token)
    ids_S, trained_S = encoder.encode(TALK)
    for turns in (2, 4):
        prompt = encoder.encode_prompt(TALK[:turns])
        assert prompt == ids_S[: len(prompt)].tolist()
        assert trained_S[len(prompt)], "what follows the prompt is what is learned"
        asked = tokenizer.apply_chat_template(plain[:turns], tokenize=False, add_generation_prompt=True)
        assert asked == template.prompt(TALK[:turns], tokenizer.eos_token)
        assert Encoder(tokenizer, of_tokenizer(tokenizer)).encode_prompt(TALK[:turns]) == prompt
    assert (ids_S[trained_S] == tokenizer.eos_token_id).sum() == 2, "every answer ends with a trained end of turn"
    if tokenizer.bos_token_id is not None and name == OWN:
        assert (ids_S == tokenizer.bos_token_id).sum() == 1


def test_own_templates_learn_answers_and_their_end_only(kinds):
    import copy

    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = CHATML.replace("{{ bos_token }}", "")
    template = named(OWN, None, tokenizer)
    adopt(tokenizer, template)
    assert tokenizer.eos_token == "<|im_end|>"
    trained = [piece for piece in template.pieces(TALK) if piece.trained]
    assert [(piece.text, piece.eos) for piece in trained] == [("    return w * h\n", True), ("<im", True)]


def test_templates_that_cannot_teach_are_refused(kinds, tmp_path):
    import copy

    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        named(OWN, None, tokenizer)
    file = tmp_path / "endless.jinja"
    file.write_text(CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "#").replace("{{ bos_token }}", ""))
    with pytest.raises(UserError, match="writes no end-of-turn token"):
        named(str(file), None, tokenizer)
    file.write_text(CHATML.replace("assistant\n{% endif", "assistant\nThink: {% endif").replace("{{ bos_token }}", ""))
    with pytest.raises(UserError, match=r"generation prompt .* is not how"):
        named(str(file), None, tokenizer)
    with pytest.raises(UserError, match="there is no file"):
        named("gone.jinja", None, tokenizer)
    with pytest.raises(UserError, match="role_markers: does nothing"):
        named(str(file), {"user": "x"}, tokenizer)


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
    with pytest.raises(RowError, match=r"messages\[1\]\.weight: is the number 0.5; allowed: 0 \(no loss\) and 1"):
        KNOWN["messages"].messages(openai)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    shared = KNOWN["sharegpt"].messages({"system": "s", "conversations": turns})
    assert [m.role for m in shared] == ["system", "user", "assistant"]


def test_the_format_is_settled_once_and_said(tmp_path, encoder):
    file = tmp_path / "x.jsonl"
    rows = [
        {"id": 1},
        {"question": "q", "answer": "a"},
        {"prompt": "q", "answer": "a"},
        {"question": "r", "answer": "b"},
    ]
    write(file, rows)
    store = prepare(Task("t", [str(file)]), encoder, DataSettings(bad_rows=BadRows.skip), tmp_path / "cache")
    assert store.report["format"] == "question_answer" and store.report["kept"] == 2
    assert store.report["dropped"]["bad row"] == 2
    write(file, [{"foo": 1}])
    with pytest.raises(UserError, match=r"task\.t: no format fits its rows; fields of the first one: 'foo'"):
        prepare(Task("t", [str(file)]), encoder, DataSettings(), tmp_path / "cache")


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"q{i}", "answer": "a"} for i in range(3000)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text[:1000]) + gzip.compress(text[1000:]))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(pack(text[:1000]) + pack(text[1000:]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    files = Task("t", [str(tmp_path)]).files()
    assert len(files) == 4
    for file in files:
        reading = Task("t", [str(file)]).rows()
        assert [row for _, _, row in reading] == rows and reading.done == reading.total


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_a_cut_file_is_refused_not_read_short(tmp_path, name):
    text = b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(5000))
    packed = gzip.compress(text) if name.endswith("gz") else zstandard.ZstdCompressor().compress(text)
    (tmp_path / name).write_bytes(packed[:-20])
    with pytest.raises(UserError, match=name):
        list(Task("t", [str(tmp_path)]).rows())


def test_a_key_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "a", "answer": "b", "answer": "c"}\n')
    ((_, _, error),) = list(Task("t", [str(tmp_path)]).rows())
    assert "the key 'answer' comes twice" in str(error) and error.text.startswith('{"prompt"')


def test_valid_files_validate_and_the_others_train(tmp_path, encoder):
    train = write(tmp_path / "train.jsonl", [chat(f"q{i}", "a") for i in range(60)])
    valid = write(tmp_path / "valid.jsonl", [chat(f"v{i}", "a") for i in range(7)])
    task = Task("t", [str(train)], valid=[str(valid)])
    store = prepare(task, encoder, DataSettings(), tmp_path / "cache")
    assert store.report["splits"] == {"train": 60, "valid": 7, "test": 0}
    both = Task("t", [str(train), str(valid)])
    assert both.fingerprint(tmp_path / "cache") != task.fingerprint(tmp_path / "cache")


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
