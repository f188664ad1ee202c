"""Small vocabularies trained in the test, in the files that released checkpoints have."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from mft.model.legacy.families import QWEN_WORDS
from tests.model import originals

SOURCES = [Path(__file__).with_name(f"{name}.py") for name in ("originals", "families")]
CODE = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
CHINESE = [
    "今天天气很好，我们去公园散步。",
    "请写一个函数，计算两个数的和。",
    "模型在多个任务上微调，损失按任务平衡。",
]
OTHER = [
    "🙂 ok 🚀🚀 done 👩‍👩‍👧‍👦",
    "  lead",
    "a  b   c\t\td",
    "people sit at the isopod's shop",
    "naïve café",
]
TEXTS = [
    *CODE.splitlines(),
    *CHINESE,
    *OTHER,
    CODE,
    "",
    " ",
    "   ",
    "\t",
    "\n",
    "\r\n \n",
    " a",
    "a ",
    "        return x\n\n\n",
    "▁ ▁a",
    "\x00",
    "e\u0301 é \u200b\u3000\u00a0",
    "<0x41> <s> [INST] <n>",
    "ababababab aaaa aaaaaaa",
    "١٢٣ 42 1999 Ⅷ",
]
"""Code, Chinese, emoji, whitespace of every kind, and look-alikes of special pieces."""

OF_BAICHUAN = {  # as Baichuan 2 has it
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": True, "single_word": True},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": True, "single_word": True},
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": True, "single_word": True},
    "pad_token": {"__type": "AddedToken", "content": "<unk>", "normalized": True, "single_word": True},
}


def sentencepiece(file: Path, **options: Any) -> Path:
    """Trains a BPE with byte fallback, as the released ones are (no rule of normalisation, spaces kept)."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    given: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 800,
        "byte_fallback": True,
        "split_digits": True,
    }
    given |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    given |= {"allow_whitespace_only_pieces": True, "character_coverage": 0.999, "num_threads": 1}
    lines = [line for line in TEXTS for _ in range(3) if line and "\x00" not in line]
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **(given | options))
    file.write_bytes(model.getvalue())
    return file


def tiktoken(file: Path, pattern: str, size: int = 700) -> dict[bytes, int]:
    """Trains a byte-level BPE and writes its ranks; returns them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranks = {bytes(letters[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}
    lines = [
        b"%s %d\n" % (base64.b64encode(t), r) for t, r in sorted(ranks.items(), key=lambda pair: pair[1])
    ]
    file.write_bytes(b"".join(lines))
    return ranks


def released(
    folder: Path, name: str, settings: dict[str, object] | None = None, weights: bool = True
) -> Path:
    """Writes a tiny checkpoint of that family as it is released, remote code named and all."""
    alike = {"chatglm2": "chatglm2_32k", "chatglm3": "chatglm3_32k", "codegeex2": "chatglm2_32k"}
    fixture = (alike | {"baichuan_7b": "baichuan2_7b"}).get(name, name)
    values: dict[str, object] = {"padded_vocab_size": 832} if "chat" in fixture else {"vocab_size": 960}
    folder.mkdir(parents=True)
    if weights:
        originals.write(folder, fixture, **values)
    config: dict[str, object] = {}
    if name == "qwen":
        tiktoken(folder / "qwen.tiktoken", QWEN_WORDS)
        config = {
            "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.X", None]},
        }
    elif name == "aquila2":
        merges(folder)
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "eos_token": "</s>",
            "bos_token": "<s>",
            "add_prefix_space": False,
        }
    else:
        sentencepiece(folder / "tokenizer.model", add_dummy_prefix="baichuan" not in name)
        kind = "BaichuanTokenizer" if "baichuan" in name else "ChatGLMTokenizer"
        config = {"tokenizer_class": kind, "auto_map": {"AutoTokenizer": [f"tokenization.{kind}", None]}}
        config |= OF_BAICHUAN if name == "baichuan2_13b" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | (settings or {})))
    return folder


def merges(folder: Path) -> None:
    """Trains the byte-level BPE of GPT-2's kind that Aquila has: vocab.json and merges.txt."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer(add_prefix_space=False)
    special = ["<|endoftext|>", "<s>", "</s>"]
    tokenizer.train_from_iterator(TEXTS, vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.save_model(str(folder))
