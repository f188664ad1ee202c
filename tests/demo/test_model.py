"""The real model out of its GGUF file: it predicts text, answers in its chat format, and is made once."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path

import pytest

from mft import demo
from mft.demo import model
from mft.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        model.find()
    except UserError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("cache")
    demo.part(root, "model", print)
    assert demo.complete(root, "model")
    return root / "model"


@pytest.fixture(scope="module")
def loaded(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)


def test_it_predicts_code_and_english(loaded):
    english = (
        "Bread is made from flour, water, salt and yeast. The dough has to rest in a warm place until it "
        "has doubled "
        "in size, and then it is baked in a hot oven for about forty minutes."
    )
    assert model.mean_nll(*loaded, inspect.getsource(textwrap)[:4_000]) < 2.8
    assert model.mean_nll(*loaded, english) < 3.2


def test_the_tokenizer_is_the_released_one(loaded):
    _, tokenizer = loaded
    assert tokenizer.is_fast and len(tokenizer) == model.VOCABULARY
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert tokenizer.model_max_length == model.CONTEXT
    assert tokenizer.tokenize("\n    12") == ["ĊĠĠĠĠ", "1", "2"]
    text = "def f(x):\n\treturn x ** 2  # çé 2024\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_answers_through_its_chat_template(loaded):
    network, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    answer = network.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and int(answer[-1]) == tokenizer.eos_token_id


def test_a_conversion_gone_wrong_is_refused(loaded):
    with pytest.raises(RuntimeError, match="read wrongly"):
        model.check(*loaded, nll=9.0)


def test_the_second_call_makes_nothing(folder: Path, tmp_path: Path):
    (tmp_path / "demo" / "tasks").mkdir(parents=True)
    (tmp_path / "demo" / "model").mkdir()
    (tmp_path / "demo" / "about.json").write_text(
        json.dumps({name: {"format": number} for name, number in demo.FORMATS.items()})
    )
    demo.make(tmp_path, pytest.fail)
