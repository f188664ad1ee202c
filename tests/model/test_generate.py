"""Answers: through the chat template, a batch as each alone, from adapters, full models and run folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mft.batch import Message
from mft.errors import UserError
from mft.model.export import save_final
from mft.model.forward import TokenLoss
from mft.model.generate import Answerer, prompt
from mft.model.peft import Full, Lora, QLora
from mft.model.tiny import Tiny

TEMPLATE = (
    "{% for m in messages %}<s>{{ {'user': 'human', 'assistant': 'bot'}.get(m['role'], m['role']) }}\n"
    "{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token + '\n' }}{% elif m['role'] == 'system' %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>bot\n' }}{% endif %}"
)
QUESTIONS = ["hi", "Write a test for this function: def add(a, b): return a + b", "x" * 40]


@pytest.fixture
def run(tiny: Tiny, tokenizer, tmp_path: Path) -> Path:
    """A run folder whose final/ is a full model."""
    tokenizer.chat_template = TEMPLATE
    model = tiny.model(torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():  # fresh weights only ever repeat the last token
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    save_final(TokenLoss(model, tiny), tokenizer, tmp_path / "final")
    return tmp_path


def test_batch_equals_single(run: Path) -> None:
    answerer = Answerer(run)
    together = answerer.answer(QUESTIONS, do_sample=False, max_new_tokens=12)
    assert together == [answerer.answer([q], do_sample=False, max_new_tokens=12)[0] for q in QUESTIONS]
    assert len(set(together)) > 1
    assert answerer.answer([]) == []


def test_greedy_is_the_argmax_of_the_forward(run: Path) -> None:
    answerer = Answerer(run)
    ids = answerer.tokenizer(prompt(answerer.tokenizer, "hi"), add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(6):
            following = answerer.model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, following[:, None]], 1)
    text = answerer.tokenizer.decode(ids[0, -6:], skip_special_tokens=True)
    assert answerer.answer(["hi"], do_sample=False, max_new_tokens=6) == [text]


def test_prompt_is_the_template(run: Path) -> None:
    answerer = Answerer(run)
    assert prompt(answerer.tokenizer, "hi") == "<s>human\nhi<s>bot\n"
    assert prompt(answerer.tokenizer, "hi", system="Be short.") == "<s>system\nBe short.\n<s>human\nhi<s>bot\n"
    turns = [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}, {"role": "user", "content": "c"}]
    expected = "<s>human\na<s>bot\nb<|endoftext|>\n<s>human\nc<s>bot\n"
    assert prompt(answerer.tokenizer, turns) == expected
    assert (
        prompt(answerer.tokenizer, [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]) == expected
    )


def test_sampling_options_reach_the_model(run: Path) -> None:
    answerer = Answerer(run)
    torch.manual_seed(0)
    hot = answerer.answer(["hi"] * 4, temperature=5.0, top_p=1.0, max_new_tokens=8)
    assert len(set(hot)) > 1
    cold = answerer.answer(["hi"] * 4, temperature=1e-4, max_new_tokens=8)
    assert set(cold) == set(answerer.answer(["hi"], do_sample=False, max_new_tokens=8))
    state = torch.random.get_rng_state()
    seeded = [answerer.answer(["hi"], temperature=5.0, top_p=1.0, max_new_tokens=8, seed=s) for s in (1, 2, 1)]
    assert seeded[0] == seeded[2] != seeded[1] and torch.equal(state, torch.random.get_rng_state())
    beams = answerer.answer(["hi"], do_sample=False, num_beams=3, repetition_penalty=1.3, max_new_tokens=8)
    assert len(beams) == 1


@pytest.mark.parametrize("peft", [Lora(), QLora()], ids=["lora", "qlora"])
def test_answers_of_an_adapter(tiny: Tiny, tokenizer, tmp_path: Path, peft: Full) -> None:
    tokenizer.chat_template = TEMPLATE
    model = peft.attach(tiny.model(torch.float32, peft.quantization(torch.float32)), tiny)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_final(TokenLoss(model, tiny), tokenizer, tmp_path)
    adapted = Answerer(tmp_path).answer(QUESTIONS, do_sample=False, max_new_tokens=8)
    base = Answerer(tiny.folder(), tokenizer=tokenizer).answer(QUESTIONS, do_sample=False, max_new_tokens=8)
    assert adapted != base


def test_without_a_template_or_a_model(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        Answerer(tiny.folder())
    with pytest.raises(UserError, match="holds no model"):
        Answerer(tmp_path)
