"""A released folder in its original format, with its own vocabulary and no tokenizer.json: what it encodes,
and that it trains and leaves as a native folder."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.errors import UserError
from mft.model.legacy.families import QWEN_WORDS
from mft.model.legacy.original import Original
from tests.model import originals, vocabularies
from tests.model.vocabularies import released
from tests.tiny_runs import train

CHATGLM = [
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]


def family_of(name: str, folder: Path) -> Original:
    return build(compose_resolved([f"model={name}", f"model.path={folder}"]).model, "model")


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "codegeex2"])
def test_chatglm(name: str, tmp_path: Path) -> None:
    folder = released(tmp_path / name, name, weights=False)
    tokenizer = family_of(name, folder).tokenizer()
    library = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    extra = CHATGLM if name == "chatglm3" else CHATGLM[:5]
    n = library.vocab_size()
    assert tokenizer.convert_tokens_to_ids(extra) == list(range(n, n + len(extra))) and len(
        tokenizer
    ) == n + len(extra)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", library.eos_id())
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == (
        "<unk>",
        library.unk_id(),
        "left",
    )
    for text in vocabularies.TEXTS:
        ids = library.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert tokenizer(text).input_ids == [n + 1, n + 3, *ids]  # [gMASK] sop
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == library.decode(ids)
    marked = tokenizer("[gMASK]<|user|>\nhi", add_special_tokens=False).input_ids
    rest = [n + 6, *library.encode("\nhi")] if name == "chatglm3" else library.encode("<|user|>\nhi")
    assert marked == [n + 1, *rest]


def test_a_piece_that_is_called_sop(tmp_path: Path) -> None:
    """The id after the vocabulary then has another name, as GLM-4 gave it."""
    folder = released(tmp_path / "chatglm2", "chatglm2", weights=False)
    vocabularies.sentencepiece(folder / "tokenizer.model", user_defined_symbols=["sop"])
    tokenizer = family_of("chatglm2", folder).tokenizer()
    library = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = library.encode("an isopod")
    assert library.piece_to_id("sop") in ids and tokenizer.decode(ids) == "an isopod"
    assert tokenizer("an isopod").input_ids == [library.vocab_size() + 1, library.vocab_size() + 3, *ids]
    assert tokenizer.convert_tokens_to_ids("<sop>") == library.vocab_size() + 3


def test_qwen(tmp_path: Path) -> None:
    folder = released(tmp_path / "qwen", "qwen", weights=False)
    ranks = vocabularies.tiktoken(folder / "qwen.tiktoken", QWEN_WORDS)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    numbers = {token: len(ranks) + i for i, token in enumerate(special)}
    library = tiktoken.Encoding("qwen", pat_str=QWEN_WORDS, mergeable_ranks=ranks, special_tokens=numbers)
    tokenizer = family_of("qwen", folder).tokenizer()
    assert len(tokenizer) == library.n_vocab
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (library.eot_token, "<|extra_1|>")
    for text in [
        *vocabularies.TEXTS,
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|> <|extra_204|><|extra_205|>",
    ]:
        ids = library.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("name", ["baichuan_7b", "baichuan2_13b"])
def test_baichuan(name: str, tmp_path: Path) -> None:
    folder = released(tmp_path / name, name, weights=False)
    tokenizer = family_of(name, folder).tokenizer()
    library = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (library.eos_id(), "<unk>")
    start = [] if name == "baichuan2_13b" else [library.bos_id()]  # the code's default is to add it
    for text in vocabularies.TEXTS:
        if "<s>" not in text:
            assert tokenizer(text).input_ids == start + library.encode(text)
            assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text))
    around = tokenizer(
        "a<s> b</s>", add_special_tokens=False
    ).input_ids  # its special tokens are found in a text
    assert around == [*library.encode("a"), 1, *library.encode(" b"), 2]


def test_aquila(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    folder = released(tmp_path / "aquila2", "aquila2", weights=False)
    (folder / "config.json").write_text((originals.FIXTURES / "aquila2" / "config.json").read_text())
    library = ByteLevelBPETokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), add_prefix_space=False
    )
    tokenizer = family_of("aquila2", folder).tokenizer()
    assert tokenizer.eos_token_id == library.token_to_id("</s>")
    for text in vocabularies.TEXTS:
        if "<s>" not in text:
            assert tokenizer(text).input_ids == library.encode(text).ids
            assert tokenizer.decode(library.encode(text).ids) == text


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "baichuan_7b",
            {"eos_token": "<end>"},
            r"eos_token='<end>' of its tokenizer_config\.json is not in tokenizer",
        ),
        ("qwen", {"added_tokens_decoder": {"908": {"content": "<mine>"}}}, "adds the token '<mine>' as 908"),
        (
            "chatglm2",
            {"added_tokens_decoder": {"806": {"content": "<|user|>"}}},
            "'<|user|>' as 806".replace("|", r"\|"),
        ),
    ],
)
def test_what_the_code_does_not_say_is_refused(
    name: str, settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        family_of(name, released(tmp_path / name, name, settings, weights=False)).tokenizer()


def test_without_a_vocabulary_or_with_a_tokenizer_json(tokenizer, tmp_path: Path) -> None:
    folder = released(tmp_path / "qwen", "qwen", weights=False)
    (folder / "qwen.tiktoken").unlink()
    with pytest.raises(UserError, match=r"has neither qwen\.tiktoken nor tokenizer\.json"):
        family_of("qwen", folder).tokenizer()
    tokenizer.save_pretrained(folder)
    originals.write(folder, "qwen")
    assert family_of("qwen", folder).tokenizer().get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aquila2", "baichuan2_13b"])  # the others: test_native_folders.py
def test_a_released_folder_trains_and_leaves_native(name: str, tmp_path: Path, cache_dir: Path) -> None:
    folder = released(tmp_path / name, name)
    asked = ["peft=full", f"model={name}", f"model.path={folder}", "train.max_steps=2"]
    summary, run = train(tmp_path, cache_dir, *asked)
    assert summary["status"] == "finished"
    before, after = family_of(name, folder).tokenizer(), AutoTokenizer.from_pretrained(run / "final")
    assert after.eos_token == before.eos_token == ("<|endoftext|>" if name == "qwen" else "</s>")
    for text in vocabularies.TEXTS:
        ids = before(text).input_ids
        assert after(text).input_ids == ids and after.decode(ids) == before.decode(ids)
    if name != "baichuan2_13b":  # ALiBi: see docs/models.md
        model = AutoModelForCausalLM.from_pretrained(run / "final")
        assert model(torch.tensor([after("def add(a, b):").input_ids])).logits.isfinite().all()
