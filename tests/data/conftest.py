"""A tokenizer, tasks and stores made in code."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from mft.batch import Message
from mft.data.cache.store import prepare
from mft.data.settings import DataSettings
from mft.data.task import Task
from mft.data.template import Template
from mft.data.tokenize import Encoder

CORPUS = [
    "def area(width, height):\n    return width * height\n",
    "Write the body of this function.\n<s>system\n<s>human\n<s>bot\n",
    "    for line in lines:\n        print(line.strip())\n",
    "Was ist größer? 長さ\n",
]


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 400 entries in which blanks merge with the newline before them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    lines = pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [lines, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    Message("system", "Be short."),
    Message("user", "def area(w, h):\n"),
    Message("assistant", "    return w * h\n"),
    Message("user", "größer?"),
    Message("assistant", "<im"),
]


@pytest.fixture(scope="session")
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer, Template())


def metaspace(bos: bool):
    """A sentencepiece-like tokenizer: blanks are ▁, one is put before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    backend.train_from_iterator(
        ["def area of a\n"] * 9, trainers.BpeTrainer(special_tokens=[*special, *bytes_], vocab_size=300)
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def kinds(tokenizer):
    """Tokenizers of several kinds by name, each with the special tokens of chatML."""
    byte_level = copy.deepcopy(tokenizer)
    byte_level.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return {"bytes": byte_level, "metaspace": metaspace(False), "metaspace+bos": metaspace(True)}


@pytest.fixture(params=["bytes", "metaspace", "metaspace+bos"])
def kind(request, kinds):
    """One of them, fresh, so that a test may change it."""
    return copy.deepcopy(kinds[request.param])


def text_of(template: Template, messages: list[Message], eos: str, generation: bool = False) -> str:
    """What a template writes, as one text, with its end of sequence written out."""
    return "".join(s.text + eos * s.eos for s in template.segments(messages, generation))


def chat(*turns: str, system: str = "") -> dict:
    """A row: human and bot turns alternating."""
    rounds = [{"role": ("human", "bot")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"id": 7, "chat_rounds": ([{"role": "system", "content": system}] if system else []) + rounds}


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_store(tmp_path, encoder):
    """Builds the store of a task from rows."""

    def make(rows: list[dict], name: str = "docs", **settings):
        write(tmp_path / name / "rows.jsonl", rows)
        task = Task(name=name, paths=[str(tmp_path / name)])
        return prepare(task, encoder, DataSettings(**settings), tmp_path / "cache")

    return make
