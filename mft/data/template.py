"""How a conversation is written down for the model: one text for training, for inference and for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mft.batch import Message
from mft.errors import UserError, nearest, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "bot": "assistant"}
"""Keys of role_markers → roles."""


class Piece(NamedTuple):
    """A stretch of the text that is tokenised on its own.

    eos: the end-of-sequence token follows it; thought: it is an empty thought that the template puts before an answer.
    """

    text: str
    trained: bool
    eos: bool
    thought: bool = False


class Template:
    """The template `mft`: `<s>system\\n{system}\\n<s>human\\n{input}<s>bot\\n{target}{EOS}\\n`.

    The markers are plain text to the tokenizer. Only {target}{EOS} of bot turns carries loss.
    """

    NAME: ClassVar[str] = "mft"
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

        A message of the role `text` is a piece of its own, all of it trained, with its end. Tokens never cross a
        border, so the ids of a prompt are a prefix of the training ids of the same conversation.
        generation: the text ends where the next answer is to begin.
        """
        if messages and messages[0].role == "text":
            return self._plain(messages)
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

        It needs `eos_token`, which tokenizers provide, and takes the roles human and bot as well. A comment at its
        start says what it was made from, by which `of_tokenizer` finds the pieces again.
        """
        system, user, bot = (_literal(self.markers[role]) for role in ("system", "user", "assistant"))
        return self._note() + _turns(
            system=f"{system} + message['content'] + '\\n'",
            user=f"{user} + message['content']",
            assistant=f"{bot} + message['content'] + eos_token + '\\n'",
            generation=f"{{{{ {bot} }}}}",
        )

    def _note(self) -> str:
        about = json.dumps({"template": self.NAME, "role_markers": self.markers}, sort_keys=True)
        return NOTE + about.replace("#", "\\u0023") + " -#}"

    def _plain(self, messages: Sequence[Message]) -> list[Piece]:
        return [Piece(message.content, message.train, True) for message in messages]

    def give_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes the token that ends a turn the tokenizer's end of sequence, where it is another one."""

    def fingerprint(self) -> str:
        """Returns what decides the pieces, as text."""
        return json.dumps([type(self).__qualname__, self.markers], sort_keys=True)


class MftCoder(Template):
    """The template `mftcoder`: what the training code of MFTCoder 0.5 feeds, to the id.

    `<s>system\\n{system}\\n<s>human\\n{input}\\n<s>bot\\n{target}\\n{EOS}\\n`: a line break follows every content, also
    the target, and carries its loss; narrow and other no-break spaces become blanks. In a pair nothing follows EOS, and
    the system text is not encoded apart from the question.
    """

    NAME = "mftcoder"

    def pieces(self, messages: Sequence[Message], generation: bool = False) -> list[Piece]:
        if messages and messages[0].role == "text":
            return self._plain(messages)
        pieces: list[Piece] = []
        text = ""
        for message in messages:
            content = _blanks(message.content) + "\n"
            if message.role == "assistant":
                pieces.append(Piece(content, message.train, True))
                if not message.pair:
                    pieces.append(Piece("\n", False, False))
            elif message.role == "system":
                system = self.markers["system"] + content
                if message.pair:
                    text = system
                else:
                    pieces.append(Piece(system, False, False))
            else:
                pieces.append(Piece(text + self.markers["user"] + content + self.markers["assistant"], False, False))
        if generation and not (messages and messages[-1].role == "user"):
            pieces.append(Piece(self.markers["assistant"], False, False))
        return [piece for piece in pieces if piece.text or piece.eos]

    def jinja(self) -> str:
        system, user, bot = (_literal(self.markers[role]) for role in ("system", "user", "assistant"))
        content = "message['content'] | replace('\u202f', ' ') | replace('\u00a0', ' ') + '\\n'"
        return self._note() + _turns(
            system=f"{system} + {content}",
            user=f"{user} + {content} + {bot}",
            assistant=f"{content} + eos_token + '\\n'",
            generation=f"{{%- if not messages or messages[-1]['role'] not in ['user', 'human'] -%}}{{{{ {bot} }}}}"
            "{%- endif -%}",
        )

    def _plain(self, messages: Sequence[Message]) -> list[Piece]:
        return [Piece(_blanks(message.content) + "\n", message.train, True) for message in messages]


TEMPLATES: dict[str, type[Template]] = {"mft": Template, "mftcoder": MftCoder}

OWN = "tokenizer"
"""The name under which `data.template` asks for the tokenizer's own chat template."""

FILES = (".jinja", ".jinja2", ".j2")
"""Endings of a chat template in a file of the user's."""

NOTE = "{#- made by mft from "


def is_file(name: str) -> bool:
    """Whether `data.template` names a file."""
    return name.lower().endswith(FILES)


def check(name: str, role_markers: Mapping[str, str] | None = None) -> None:
    """Raises UserError where `data.template` is neither a template's name nor a file that is there, and for markers
    that it cannot take."""
    if name in TEMPLATES:
        TEMPLATES[name](role_markers)
    elif is_file(name):
        if not Path(name).expanduser().is_file():
            raise UserError(f"data.template: there is no file {name}")
    elif name != OWN:
        allowed = ", ".join((*TEMPLATES, OWN))
        raise UserError(
            f"data.template: unknown template {name!r}; allowed: {allowed}, or a file *.jinja"
            f"{nearest(name, (*TEMPLATES, OWN))}"
        )
    if role_markers and name not in TEMPLATES:
        raise UserError(f"data.role_markers: does nothing with data.template={name}, which writes its own markers")


def named(
    name: str, role_markers: Mapping[str, str] | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Template:
    """Returns the template `data.template` asks for; raises UserError for an unknown name.

    tokenizer: whose chat template `tokenizer` means, and which renders a file's.
    """
    from mft.data.jinja import Jinja

    check(name, role_markers)
    if name in TEMPLATES:
        return TEMPLATES[name](role_markers)
    assert tokenizer is not None, "a Jinja template is rendered by the tokenizer"
    if name == OWN:
        return of_tokenizer(tokenizer)
    try:
        source = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template={name}: cannot be read as UTF-8 text: {error}") from error
    return Jinja(source, tokenizer, name)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Returns the template by which a saved tokenizer's model was trained, to encode prompts as in training.

    Raises UserError for a tokenizer without a chat template.
    """
    from mft.data.jinja import Jinja

    source: Any = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise UserError(
            "data.template=tokenizer: the tokenizer has no chat template; allowed: mft, mftcoder, or a file of yours, "
            "e.g. data.template=my.jinja"
        )
    if source.startswith(NOTE):
        about = json.loads(source[len(NOTE) : source.index(" -#}")])
        template = TEMPLATES[about["template"]]()
        template.markers = about["role_markers"]
        return template
    return Jinja(source, tokenizer, OWN)


def adopt(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Gives the tokenizer the template, to be saved with the checkpoint, and its end of turn as end of sequence."""
    tokenizer.chat_template = template.jinja()
    template.give_end(tokenizer)


def _turns(system: str, user: str, assistant: str, generation: str) -> str:
    """Returns a chat template from the Jinja expression of each role's turn and the generation prompt."""
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}"
        f"{{{{ {system} }}}}"
        "{%- elif message['role'] in ['user', 'human'] -%}"
        f"{{{{ {user} }}}}"
        "{%- elif message['role'] in ['assistant', 'bot'] -%}"
        f"{{{{ {assistant} }}}}"
        "{%- else -%}"
        "{{ raise_exception('unknown role ' + message['role'] + '; allowed: system, user, assistant') }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{generation}{{%- endif -%}}"
    )


def _blanks(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u00a0", " ")


def _literal(text: str) -> str:
    """Returns a Jinja string literal; non-ASCII stays as it is, since Jinja does not join JSON's surrogate escapes."""
    return json.dumps(text, ensure_ascii=False)
