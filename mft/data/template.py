"""How a conversation is written down for the model: one text for training, for inference and for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from mft.batch import Message
from mft.errors import UserError, nearest, shortened

KEYS = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "bot": "assistant"}
"""Keys of role_markers → roles."""


class Piece(NamedTuple):
    """A stretch of the text that is tokenised on its own; `eos`: the end-of-sequence token follows it."""

    text: str
    trained: bool
    eos: bool


class Template:
    """The template `mft`: `<s>system\\n{system}\\n<s>human\\n{input}<s>bot\\n{target}{EOS}\\n`.

    The markers are plain text to the tokenizer. Only {target}{EOS} of bot turns carries loss.
    """

    MARKERS: ClassVar[Mapping[str, str]] = {
        "system": "<s>system\n",
        "user": "<s>human\n",
        "assistant": "<s>bot\n",
    }

    def __init__(self, role_markers: Mapping[str, str] | None = None):
        """role_markers replaces markers by role (system, user or human, assistant or bot); None keeps them all."""
        self.markers = dict(self.MARKERS)
        given: dict[str, str] = {}
        for key, marker in (role_markers or {}).items():
            if key not in KEYS:
                allowed = ", ".join(KEYS)
                raise UserError(f"data.role_markers: unknown role {key!r}; allowed: {allowed}{nearest(key, KEYS)}")
            if not isinstance(marker, str):
                raise UserError(f"data.role_markers.{key}: {shortened(marker)} is not text; allowed: the marker's text")
            role = KEYS[key]
            if role in given:
                raise UserError(f"data.role_markers: {given[role]} and {key} are the same role; give one of them")
            given[role] = key
            self.markers[role] = marker.replace("\\n", "\n")  # Hydra's command line has no escape for a line break

    def pieces(self, messages: Sequence[Message], generation: bool = False) -> list[Piece]:
        """Returns the text in pieces, with a border at the start of each bot target and after it.

        Tokens never cross a border, so the ids of a prompt are a prefix of the training ids of the same conversation.
        generation: the text ends where the next answer is to begin.
        """
        pieces = []
        text = ""
        for message in messages:
            text += self.markers[message.role]
            if message.role == "assistant":
                pieces += [Piece(text, False, False), Piece(message.content, message.train, True)]
                text = "\n"
            else:
                text += message.content + ("\n" if message.role == "system" else "")
        if generation:
            text += self.markers["assistant"]
        return [*pieces, Piece(text, False, False)] if text else pieces

    def text(self, messages: Sequence[Message], eos_token: str, generation: bool = False) -> str:
        """Returns the whole text, `eos_token` written out."""
        return "".join(p.text + eos_token * p.eos for p in self.pieces(messages, generation))

    def prompt(self, messages: Sequence[Message], eos_token: str) -> str:
        """Returns the text a model is given to continue with its answer."""
        return self.text(messages, eos_token, generation=True)

    def jinja(self) -> str:
        """Returns the chat template to save in the tokenizer; it renders the same text.

        It needs `eos_token`, which tokenizers provide, and takes the roles human and bot as well.
        """
        system, user, bot = (_literal(self.markers[role]) for role in ("system", "user", "assistant"))
        return (
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'system' -%}"
            f"{{{{ {system} + message['content'] + '\\n' }}}}"
            "{%- elif message['role'] in ['user', 'human'] -%}"
            f"{{{{ {user} + message['content'] }}}}"
            "{%- elif message['role'] in ['assistant', 'bot'] -%}"
            f"{{{{ {bot} + message['content'] + eos_token + '\\n' }}}}"
            "{%- else -%}"
            "{{ raise_exception('unknown role ' + message['role'] + '; allowed: system, user, assistant') }}"
            "{%- endif -%}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{ {bot} }}}}{{%- endif -%}}"
        )

    def fingerprint(self) -> str:
        """Returns what decides the pieces, as text."""
        return json.dumps([type(self).__qualname__, self.markers], sort_keys=True)


TEMPLATES: dict[str, type[Template]] = {"mft": Template}


def named(name: str, role_markers: Mapping[str, str] | None = None) -> Template:
    """Returns the template `data.template` asks for; raises UserError for an unknown name."""
    if name not in TEMPLATES:
        allowed = ", ".join(TEMPLATES)
        raise UserError(f"data.template: unknown template {name!r}; allowed: {allowed}{nearest(name, TEMPLATES)}")
    return TEMPLATES[name](role_markers)


def _literal(text: str) -> str:
    """Returns a Jinja string literal; non-ASCII stays as it is, since Jinja does not join JSON's surrogate escapes."""
    return json.dumps(text, ensure_ascii=False)
