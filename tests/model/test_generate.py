"""Answers: through the chat template, a batch as each alone, from adapters, full models and run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mft.batch import Message
from mft.config.schema import default_cache_dir
from mft.data.formats import Chat
from mft.data.template import OWN
from mft.data.template_choice import adopt, named
from mft.data.tokenize import Encoder
from mft.errors import UserError
from mft.model.export import save_final
from mft.model.generate import Answerer, answer, messages
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss
from tests.data.conftest import text_of

TEMPLATE = (
    "{% for m in messages %}<s>{{ {'user': 'human', 'assistant': 'bot'}.get(m['role'], m['role']) }}\n"
    "{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token + '\n' }}{% elif m['role'] == 'system' %}{{ '\n' }}{% "
    "endif %}"
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
    answerer = Answerer(run, Encoder.saved)
    together = answerer.answer(QUESTIONS, do_sample=False, max_new_tokens=12)
    assert together == [answerer.answer([q], do_sample=False, max_new_tokens=12)[0] for q in QUESTIONS]
    assert len(set(together)) > 1
    assert answerer.answer([]) == []


def test_greedy_is_the_argmax_of_the_forward(run: Path) -> None:
    answerer = Answerer(run, Encoder.saved)
    ids = torch.tensor([answerer.encoder.encode_prompt(messages("hi"))])
    with torch.no_grad():
        for _ in range(6):
            following = answerer.model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, following[:, None]], 1)
    text = answerer.tokenizer.decode(ids[0, -6:], skip_special_tokens=True)
    assert answerer.answer(["hi"], do_sample=False, max_new_tokens=6) == [text]


def test_prompt_is_the_template(run: Path) -> None:
    answerer = Answerer(run, Encoder.saved)

    def asked(conversation, system: str | None = None) -> str:
        return answerer.tokenizer.decode(answerer.encoder.encode_prompt(messages(conversation, system)))

    assert asked("hi") == "<s>human\nhi<s>bot\n"
    assert asked("hi", system="Be short.") == "<s>system\nBe short.\n<s>human\nhi<s>bot\n"
    turns = [
        {"role": "human", "content": "a"},
        {"role": "bot", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    expected = "<s>human\na<s>bot\nb<|endoftext|>\n<s>human\nc<s>bot\n"
    assert asked(turns) == expected
    assert asked([Message("user", "a"), Message("assistant", "b"), Message("user", "c")]) == expected
    own = [{"role": "system", "content": "S"}, *turns]
    assert asked(own, system="other") == asked(own), "a conversation's own system text stays"
    with pytest.raises(
        UserError, match=r"to be answered has the role 'tool'; allowed: system, user, human, assistant, bot"
    ):
        messages([{"role": "tool", "content": "x"}])
    with pytest.raises(UserError, match="needs the text content: "):
        messages([{"role": "user"}])


TALKS = [
    [
        Message("system", "Be short."),
        Message("user", "Write the body:\n\ndef area(w, h):\n"),
        Message("assistant", "    return w * h\n"),
        Message("user", "und größer?\n"),
        Message("assistant", "\n\n        return 2 * w * h"),
        Message("user", ""),
        Message("assistant", " no"),
    ],
    [Message("user", "hi"), Message("assistant", "\thello")],
]


def smollm2() -> list[str]:
    folder = Path(default_cache_dir()) / "demo" / "model"
    return [str(folder)] if (folder / "tokenizer.json").is_file() else []


@pytest.mark.parametrize("name", ["mft", "mftcoder", OWN])
@pytest.mark.parametrize("where", ["tiny", *smollm2()], ids=lambda where: Path(where).parent.name)
def test_a_saved_model_is_asked_in_the_ids_it_was_trained_on(
    tiny: Tiny, tmp_path: Path, name: str, where: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny.tokenizer() if where == "tiny" else AutoTokenizer.from_pretrained(where)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    template = named(name, None, tokenizer)
    adopt(tokenizer, template)
    training = Encoder(tokenizer, template)
    save_final(TokenLoss(tiny.model(torch.float32), tiny), tokenizer, tmp_path / "final")

    answerer = Answerer(tmp_path, Encoder.saved)
    given: list[dict] = []
    answerer.model.generate = lambda **inputs: given.append(inputs) or inputs["input_ids"]
    talks = list(TALKS)
    if where != "tiny":
        rows = Path(where).parent / "tasks" / "function_body" / "train.jsonl"
        with rows.open(encoding="utf-8") as file:
            talks += [Chat().messages(json.loads(next(file))) for _ in range(200)]
    merged = 0
    for talk in talks:
        ids = training.encode(talk)[0].tolist()
        for turn in [i for i, message in enumerate(talk) if message.role == "assistant"]:
            answerer.answer([talk[:turn]])
            asked = given.pop()["input_ids"][0].tolist()
            assert asked == ids[: len(asked)] and len(asked) < len(ids)
            whole = tokenizer(
                text_of(template, talk, tokenizer.eos_token), add_special_tokens=False
            ).input_ids
            merged += whole[: len(asked)] != asked
    if where != "tiny":
        assert merged > 100, "encoded as one string, a newline merges with the blanks of the answer"


def test_prompts_of_a_batch_are_padded_on_the_left(run: Path) -> None:
    answerer = Answerer(run, Encoder.saved)
    given: list[dict] = []
    answerer.model.generate = lambda **inputs: given.append(inputs) or inputs["input_ids"]
    answerer.answer(["a longer one", "b"])
    longer, shorter = (answerer.encoder.encode_prompt(messages(text)) for text in ("a longer one", "b"))
    n = len(longer) - len(shorter)
    assert given[0]["input_ids"].tolist() == [longer, [answerer.tokenizer.pad_token_id] * n + shorter]
    assert given[0]["attention_mask"].tolist() == [[1] * len(longer), [0] * n + [1] * len(shorter)]


def test_sampling_options_reach_the_model(run: Path) -> None:
    answerer = Answerer(run, Encoder.saved)
    torch.manual_seed(0)
    hot = answerer.answer(["hi"] * 4, temperature=5.0, top_p=1.0, max_new_tokens=8)
    assert len(set(hot)) > 1
    cold = answerer.answer(["hi"] * 4, temperature=1e-4, max_new_tokens=8)
    assert set(cold) == set(answerer.answer(["hi"], do_sample=False, max_new_tokens=8))
    state = torch.random.get_rng_state()
    seeded = [
        answerer.answer(["hi"], temperature=5.0, top_p=1.0, max_new_tokens=8, seed=s) for s in (1, 2, 1)
    ]
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
    adapted = Answerer(tmp_path, Encoder.saved).answer(QUESTIONS, do_sample=False, max_new_tokens=8)
    base = Answerer(tiny.folder(), Encoder.saved, tokenizer=tokenizer).answer(
        QUESTIONS, do_sample=False, max_new_tokens=8
    )
    assert adapted != base


def test_without_a_template_or_a_model(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        Answerer(tiny.folder(), Encoder.saved)
    with pytest.raises(UserError, match="holds no model"):
        Answerer(tmp_path, Encoder.saved)


def test_the_question_goes_to_where_the_model_computes(run: Path) -> None:
    """One device is here, so the meta device stands for where offloaded parameters lie."""
    encoder = Answerer(run, Encoder.saved).encoder

    class Offloaded(torch.nn.Linear):
        def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            assert input_ids.device.type == "cpu"
            return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    model = Offloaded(2, 2, device="meta")
    assert len(answer(model, encoder, ["hi"], do_sample=False, device=torch.device("cpu"))) == 1
