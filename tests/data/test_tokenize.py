import numpy as np
import pytest

from mft.batch import Message
from mft.data.template import Template
from mft.data.tokenize import Encoder
from mft.errors import UserError
from tests.data.conftest import text_of

CONVERSATION = [
    Message("system", "Be short."),
    Message("user", "def area(width, height):\n"),
    Message("assistant", "    return width * height\n"),
    Message("user", "Was ist größer? 長さ"),
    Message("assistant", "\n  x"),
]


def test_ids_spell_the_text_and_the_mask_covers_the_answers(tokenizer, encoder):
    ids_S, trained_S = encoder.encode(CONVERSATION)
    assert ids_S.dtype == np.int32 and trained_S.dtype == bool
    assert tokenizer.decode(ids_S) == text_of(Template(), CONVERSATION, tokenizer.eos_token)
    trained = "    return width * height\n<|endoftext|>\n  x<|endoftext|>"
    assert tokenizer.decode(ids_S[trained_S]) == trained


@pytest.mark.parametrize("turns", [2, 4])
def test_the_prompt_is_a_prefix_of_the_training_ids(tokenizer, encoder, turns):
    ids_S, _ = encoder.encode(CONVERSATION)
    prompt = encoder.encode_prompt(CONVERSATION[:turns])
    assert prompt == ids_S[: len(prompt)].tolist()
    text = text_of(Template(), CONVERSATION, tokenizer.eos_token)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole != ids_S.tolist(), "the tokenizer should be one for which segments matter"


def test_a_turn_without_loss(tokenizer, encoder):
    messages = [Message("user", "q"), Message("assistant", "a", train=False)]
    ids_S, trained_S = encoder.encode(messages)
    assert ids_S[-2] == tokenizer.eos_token_id and not trained_S.any()


def test_the_first_token_keeps_its_mark(tokenizer):
    encoder = Encoder(tokenizer, Template({"bot": "", "user": ""}))
    ids_S, trained_S = encoder.encode([Message("user", ""), Message("assistant", "ab")])
    assert trained_S.tolist() == [True] * (len(ids_S) - 1) + [False]


def test_batches_equal_single_calls_and_the_slow_way(tokenizer, encoder):
    conversations = [CONVERSATION, CONVERSATION[1:3], [Message("user", "q"), Message("assistant", "a")]]
    batch = encoder.encode_segments([Template().segments(messages) for messages in conversations])
    for (ids_S, trained_S), messages in zip(batch, conversations, strict=True):
        one_ids, one_trained = encoder.encode(messages)
        assert ids_S.tolist() == one_ids.tolist() and trained_S.tolist() == one_trained.tolist()
        slow = []
        for segment in Template().segments(messages):
            slow += tokenizer(segment.text, add_special_tokens=False)["input_ids"]
            slow += [tokenizer.eos_token_id] * segment.eos
        assert ids_S.tolist() == slow
    assert encoder.encode_segments([]) == []


def test_settings_an_earlier_call_left_in_the_tokenizer_do_not_matter(tokenizer, encoder):
    before, fingerprint = encoder.encode(CONVERSATION)[0].tolist(), encoder.fingerprint()
    tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=3)
    assert encoder.encode(CONVERSATION)[0].tolist() == before
    tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=3)
    assert encoder.fingerprint() == fingerprint


def test_the_fingerprint_follows_template_and_tokenizer(tokenizer, encoder):
    from transformers import PreTrainedTokenizerFast

    assert Encoder(tokenizer, Template()).fingerprint() == encoder.fingerprint()
    assert Encoder(tokenizer, Template({"bot": "B"})).fingerprint() != encoder.fingerprint()
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="!")
    assert Encoder(other, Template()).fingerprint() != encoder.fingerprint()


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match=r"model\.eos_token"):
        Encoder(endless, Template())
