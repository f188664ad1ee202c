"""Chat templates in Jinja, a tokenizer's own or a file; the trained part is found by rendering prefixes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from mft.batch import Message
from mft.data.row_fields import RowError
from mft.data.sandbox import TooMuch, bound
from mft.data.template import OWN, Segment, Template
from mft.errors import UserError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 250_000
"""Characters of a chat template; the longest of released models have about 20,000."""

OPENING = r"<[\w:|-]+>|\[[\w-]+\]"
CLOSING = r"</[\w:-]+>|<\|?(?:end|END)[\w:-]*\|?>|\[/[\w-]+\]"
EMPTY_THOUGHT = re.compile(rf"\s*(?:{OPENING})\s*(?:{CLOSING})\s*")
"""Tags with nothing between: <think></think>, [THINK][/THINK], <|START_THINKING|><|END_THINKING|>."""
OPENED = re.compile(rf"(?:{OPENING})\s*\Z")
"""A tag that a generation prompt opens at its end."""

PROBE = (Message("user", "What is 1+1?"), Message("assistant", "It is two."))
"""What a template is tried with; an answer that templates neither strip nor escape."""


class _Generation(Extension):
    """The tag with which templates mark answers, read as transformers does, whose own needs its import."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def check_syntax(source: str, name: str) -> None:
    """Raises UserError, with the line, for a template that Jinja cannot read; nothing is rendered."""
    try:
        Environment(extensions=[_Generation, loopcontrols]).parse(source)
    except TemplateSyntaxError as error:
        raise UserError(
            f"data.template={name}:{error.lineno}: not a Jinja template: {error.message}"
        ) from error


class Jinja(Template):
    """A chat template of which only the rendered text is known.

    The part that carries loss is what the model has to write itself: from the end of the generation prompt up
    to the first special token after the answer, that one included. An empty thought that the template puts
    before the answer is not part of it: the row does not teach to think of nothing. Raises UserError for a
    template that cannot be rendered, that writes no such token, or whose generation prompt is not how it
    begins an answer.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, name: str):
        """name: how `data.template` calls it."""
        super().__init__()
        if len(source) > LONGEST:
            problem = f"has {len(source):,} characters; a template has {LONGEST:,} at most"
            raise UserError(f"data.template={name}: {problem}")
        bound()
        self.source, self.tokenizer, self.name = source, tokenizer, name
        try:
            self.tail, self.closing, self.end = self._ending()
            self.segments(PROBE)  # raises where the prompt is not how an answer begins
        except RowError as error:
            raise UserError(f"data.template={name}: {error.problem}") from error

    def _turns(self, messages: Sequence[Message], generation: bool) -> list[Segment]:
        # The whole conversation is rendered once; each answer is found in it by rendering what comes before.
        text = self._render(messages, generation)
        eos = str(self.tokenizer.eos_token or "")
        segments, done = [], 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start, answer_start, stop = self._trained(messages, i, text)
            segments.append(Segment(text[done:start]))
            if answer_start > start:  # a separate segment, so that the ids of the prompt stay a prefix
                segments.append(Segment(text[start:answer_start], thought=True))
            answer = text[answer_start:stop]
            ends = bool(eos) and answer.endswith(eos)
            segments.append(Segment(answer.removesuffix(eos) if ends else answer, message.train, ends))
            done = stop
        return [*segments, Segment(text[done:])] if done < len(text) else segments

    def jinja(self) -> str:
        return self.source

    def fingerprint(self) -> str:
        return json.dumps([type(self).__qualname__, self.source])

    def give_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        before = tokenizer.eos_token
        if self.end == before:
            return
        text = self._render(PROBE, False)
        tokenizer.eos_token = self.end  # a template may write {{ eos_token }}, so it is tried
        if self._render(PROBE, False) != text:  # the template writes its EOS elsewhere; then both must stay
            tokenizer.eos_token = before

    def _trained(self, messages: Sequence[Message], i: int, text: str) -> tuple[int, int, int]:
        """Returns where answer i begins in the rendered text, where its loss begins, and where both end."""
        prompt = self._render(messages[:i], True)
        if not text.startswith(prompt):
            end = shortened(prompt[-30:])
            raise RowError("", f"the chat template begins answers without its generation prompt (…{end})")
        until = self._render(messages[: i + 1], False)
        content = messages[i].content
        # templates often strip an answer
        forms = filter(None, (content, content.rstrip(), content.lstrip(), content.strip()))
        form = next((form for form in forms if until.endswith(form + self.tail)), None)
        if form is None:
            raise RowError("", f"the chat template does not write out the answer {shortened(content)}")
        stop = len(until) - len(self.tail) + len(self.closing)
        answer_start = stop - len(self.closing) - len(form)
        if not text.startswith(until[:stop]):
            # Some templates write an earlier answer shorter than the last one, e.g. without an empty thought.
            answer_start = text.find(form + self.closing, len(prompt))
            if answer_start < 0:
                shown = shortened(form)
                raise RowError("", f"the chat template changes the answer {shown} once turns follow")
            stop = answer_start + len(form) + len(self.closing)
        return len(prompt), _behind_thought(prompt, text, answer_start), stop

    def _ending(self) -> tuple[str, str, str]:
        """Returns what follows an answer: all of it, up to and with the end-of-turn token, and that token."""
        text = self._render(PROBE, False)
        answer = PROBE[-1].content
        if answer not in text:
            raise RowError("", "it does not write out the answer of an assistant's turn")
        # What may end an answer is a special token: text, such as a line break, may stand inside one.
        tail = text[text.rindex(answer) + len(answer) :]
        special = {*map(str, self.tokenizer.get_added_vocab()), *map(str, self.tokenizer.all_special_tokens)}
        # Longest first: a regular expression takes the first alternative that matches, not the longest.
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        match = re.search("|".join(map(re.escape, longest_first)), tail) if longest_first else None
        if match is None:
            raise RowError("", "it writes no end-of-turn token after an answer; add {{ eos_token }}")
        return tail, tail[: match.end()], match.group()

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            render = self.tokenizer.apply_chat_template
            return str(
                render(turns, chat_template=self.source, tokenize=False, add_generation_prompt=generation)
            )
        except TooMuch as error:  # ends the run: the next rows would take as long to be refused
            owner = self.tokenizer.name_or_path if self.name == OWN else ""
            template = f"the chat template of {owner}" if owner else "the chat template"
            raise UserError(f"data.template={self.name}: {template} is refused: {error}.") from error
        except Exception as error:  # the template is a program from outside, and may fail in any way
            reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            if isinstance(error, RecursionError):
                reason = "it is nested too deeply, or calls itself"
            raise RowError("", f"the chat template cannot write it: {reason}") from error


def _behind_thought(prompt: str, text: str, answer_start: int) -> int:
    """Returns where the loss begins: behind an empty thought, if that is all that stands before the answer's
    own text (the prompt may have opened its tag); else where the prompt ends."""
    opened = OPENED.search(prompt[-80:])
    before = text[len(prompt) : answer_start]
    empty = EMPTY_THOUGHT.fullmatch(before) or (opened and EMPTY_THOUGHT.fullmatch(opened.group() + before))
    return answer_start if before and empty else len(prompt)
