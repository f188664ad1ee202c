"""How a conversation is written for the model: the same text in training, inference and other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from mft.batch import ROLES, Message
from mft.errors import UserError, nearest, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer"
"""The name under which `data.template` asks for the tokenizer's own chat template."""

NOTE = "{#- made by mft from "
"""How a chat template begins that this module wrote; what it was made from follows as JSON."""


class Segment(NamedTuple):
    """A stretch of the text that is tokenised on its own."""

    text: str
    trained: bool = False
    eos: bool = False
    """The end-of-sequence token follows, as an id."""
    thought: bool = False
    """It is an empty thought that the template puts before an answer."""


class Template:
    """The template `mft`: `<s>system\\n{system}\\n<s>human\\n{input}<s>bot\\n{target}{EOS}\\n`.

    The markers are plain text to the tokenizer. Only {target}{EOS} of bot turns carries loss.
    """

    NAME: ClassVar[str] = "mft"

    def __init__(self, role_markers: Mapping[str, object] | None = None):
        """role_markers replaces markers by role (system, user or human, assistant or bot)."""
        self.markers = {"system": "<s>system\n", "user": "<s>human\n", "assistant": "<s>bot\n"}
        keys: dict[str, str] = {}
        for key, marker in (role_markers or {}).items():
            if key not in ROLES:
                problem = f"unknown role {key!r}; allowed: {', '.join(ROLES)}{nearest(key, ROLES)}"
                raise UserError(f"data.role_markers: {problem}")
            if not isinstance(marker, str):
                raise UserError(f"data.role_markers.{key}: {shortened(marker)} is not text")
            if (other := keys.setdefault(ROLES[key], key)) != key:
                raise UserError(f"data.role_markers: {other} and {key} are the same role; give one of them")
            # Hydra's command line has no escape for a line break
            self.markers[ROLES[key]] = marker.replace("\\n", "\n")

    def segments(self, messages: Sequence[Message], generation: bool = False) -> list[Segment]:
        """Returns the text in segments, with a border at the start of each bot target and after it.

        A message of the role `text` is a separate segment, all of it trained, with its end. Tokens never
        cross a border, so the ids of a prompt are a prefix of the training ids of the same conversation.
        generation: the text ends where the next answer is to begin.
        """
        if messages and messages[0].role == "text":
            return [Segment(self._content(message), message.train, eos=True) for message in messages]
        return self._turns(messages, generation)

    def _content(self, message: Message) -> str:
        return message.content

    def _turns(self, messages: Sequence[Message], generation: bool) -> list[Segment]:
        segments = []
        text = ""
        for message in messages:
            text += self.markers[message.role]
            if message.role == "assistant":
                # marker and answer apart: a tokenizer would merge the marker's line break with blanks behind
                segments += [Segment(text), Segment(message.content, message.train, eos=True)]
                text = "\n"
            else:
                text += message.content + ("\n" if message.role == "system" else "")
        if generation:
            text += self.markers["assistant"]
        return [*segments, Segment(text)] if text else segments

    def jinja(self) -> str:
        """Returns the chat template to save in the tokenizer; it renders the same text.

        It needs `eos_token`, which tokenizers provide, and takes the roles human and bot as well. A comment
        at its start says what it was made from, by which `of_tokenizer` finds the segments again.
        """
        system, user, bot = (_literal(self.markers[role]) for role in ("system", "user", "assistant"))
        return self._chat_template(
            system=f"{system} + message['content'] + '\\n'",
            user=f"{user} + message['content']",
            assistant=f"{bot} + message['content'] + eos_token + '\\n'",
            generation=f"{{{{ {bot} }}}}",
        )

    def _chat_template(self, system: str, user: str, assistant: str, generation: str) -> str:
        """Returns a chat template from the Jinja expression of each role's turn and the generation prompt."""
        about = json.dumps({"template": self.NAME, "role_markers": self.markers}, sort_keys=True)
        note = about.replace("#", "\\u0023")  # "#}" would end the comment
        return (
            f"{NOTE}{note} -#}}"
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

    def give_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes the token that ends a turn the tokenizer's end of sequence, where it is another one."""

    def fingerprint(self) -> str:
        """Returns what decides the segments, as text."""
        return json.dumps([type(self).__qualname__, self.markers], sort_keys=True)


class MftCoder(Template):
    """The template `mftcoder`: what the training code of MFTCoder 0.5 feeds, to the id.

    `<s>system\\n{system}\\n<s>human\\n{input}\\n<s>bot\\n{target}\\n{EOS}\\n`: a line break follows every
    content, also the target, and carries its loss; narrow and other no-break spaces become blanks. In a pair
    nothing follows EOS, and the system text is not encoded apart from the question.
    """

    NAME = "mftcoder"

    def _content(self, message: Message) -> str:
        return message.content.replace("\u202f", " ").replace("\u00a0", " ") + "\n"

    def _turns(self, messages: Sequence[Message], generation: bool) -> list[Segment]:
        segments: list[Segment] = []
        text = ""
        for message in messages:
            content = self._content(message)
            if message.role == "assistant":
                segments.append(Segment(content, message.train, eos=True))
                if not message.pair:
                    segments.append(Segment("\n"))
            elif message.role == "user":
                segments.append(Segment(text + self.markers["user"] + content + self.markers["assistant"]))
            elif message.pair:
                text = self.markers["system"] + content
            else:
                segments.append(Segment(self.markers["system"] + content))
        if generation and not (messages and messages[-1].role == "user"):
            segments.append(Segment(self.markers["assistant"]))
        return [segment for segment in segments if segment.text or segment.eos]

    def jinja(self) -> str:
        system, user, bot = (_literal(self.markers[role]) for role in ("system", "user", "assistant"))
        content = "message['content'] | replace('\u202f', ' ') | replace('\u00a0', ' ') + '\\n'"
        # A user's turn ends with the marker of the answer, so the generation prompt is there already.
        no_marker_yet = "not messages or messages[-1]['role'] not in ['user', 'human']"
        return self._chat_template(
            system=f"{system} + {content}",
            user=f"{user} + {content} + {bot}",
            assistant=f"{content} + eos_token + '\\n'",
            generation=f"{{%- if {no_marker_yet} -%}}{{{{ {bot} }}}}{{%- endif -%}}",
        )


def _literal(text: str) -> str:
    """Returns a Jinja string literal; non-ASCII stays, as Jinja does not join JSON's surrogate escapes."""
    return json.dumps(text, ensure_ascii=False)
