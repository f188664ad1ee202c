import copy

import pytest

from mft.data.template import OWN, adopt, named
from mft.errors import UserError
from tests.data.conftest import CHATML, TALK


def test_own_templates_learn_answers_and_their_end_only(kinds):
    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = CHATML.replace("{{ bos_token }}", "")
    template = named(OWN, None, tokenizer)
    adopt(tokenizer, template)
    assert tokenizer.eos_token == "<|im_end|>"
    trained = [piece for piece in template.pieces(TALK) if piece.trained]
    assert [(piece.text, piece.eos) for piece in trained] == [("    return w * h\n", True), ("<im", True)]


def test_templates_that_cannot_teach_are_refused(kinds, tmp_path):
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
