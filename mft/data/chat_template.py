"""Chat templates in Jinja, a tokenizer's own or a file; the trained part is found by rendering prefixes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from mft.batch import Message
from mft.data.formats import RowError
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

PROBE = (Message("user", "What is 1+1?"), Message("assistant", "It is two."))


class Jinja(Template):
    """A chat template of which only the rendered text is known.

    The part that carries loss is what the model has to write itself: from the end of the generation prompt up
    to the first special token after the answer, that one included. An empty thought that the template puts
    before the answer is not part of it: the row does not teach to think of nothing. Raises UserError for a
    template that cannot be rendered, that writes no such token, or whose generation prompt is not how it
    begins an answer.
    """

    NAME = "jinja"

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, name: str):
        """name: how `data.template` calls it."""
        super().__init__()
        if len(source) > LONGEST:
            raise UserError(
                f"data.template={name}: has {len(source):,} characters; a template has {LONGEST:,} at most"
            )
        bound()
        self.source, self.tokenizer, self.name = source, tokenizer, name
        special = {str(token) for token in tokenizer.get_added_vocab()} | {
            str(t) for t in tokenizer.all_special_tokens
        }
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first))) if special else None
        try:
            self.tail, self.closing, self.end = self._ending()
            self.segments(PROBE)
        except RowError as error:
            raise UserError(f"data.template={name}: {error.problem}") from error

    def segments(self, messages: Sequence[Message], generation: bool = False) -> list[Segment]:
        if messages and messages[0].role == "text":
            return self._plain(messages)
        whole = self._render(messages, generation)
        eos = str(self.tokenizer.eos_token or "")
        segments, done = [], 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start, answer_start, stop = self._trained(messages, i, whole)
            segments.append(Segment(whole[done:start], False, False))
            if answer_start > start:  # a segment of its own, so that the ids of the prompt stay a prefix
                segments.append(Segment(whole[start:answer_start], False, False, thought=True))
            answer = whole[answer_start:stop]
            if eos and answer.endswith(eos):
                segments.append(Segment(answer.removesuffix(eos), message.train, True))
            else:
                segments.append(Segment(answer, message.train, False))
            done = stop
        return [*segments, Segment(whole[done:], False, False)] if done < len(whole) else segments

    def jinja(self) -> str:
        return self.source

    def fingerprint(self) -> str:
        return json.dumps([type(self).__qualname__, self.source])

    def give_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        before = tokenizer.eos_token
        if self.end == before:
            return
        text = self._render(PROBE, False)
        tokenizer.eos_token = self.end
        if self._render(PROBE, False) != text:  # the template writes its EOS elsewhere; then both must stay
            tokenizer.eos_token = before

    def _trained(self, messages: Sequence[Message], i: int, whole: str) -> tuple[int, int, int]:
        """Returns where answer i begins in the whole text, where its loss begins, and where both end."""
        prompt = self._render(messages[:i], True)
        if not whole.startswith(prompt):
            raise RowError(
                "",
                f"the generation prompt (it ends in {shortened(prompt[-30:])}) is not how the chat "
                f"template begins an "
                "answer in training, so the model would be asked in another form than it was taught",
            )
        until = self._render(messages[: i + 1], False)
        forms = _forms(messages[i].content)
        form = next((form for form in forms if until.endswith(form + self.tail)), None)
        if form is None:
            raise RowError(
                "", f"the chat template does not write out the answer {shortened(messages[i].content)}"
            )
        stop = len(until) - len(self.tail) + len(self.closing)
        if whole.startswith(until[:stop]):
            return len(prompt), _behind_thought(prompt, whole, stop - len(self.closing) - len(form)), stop
        # Some templates write an earlier answer shorter than the last one, e.g. without its empty thoughts.
        at = whole.find(form + self.closing, len(prompt))
        if at < 0:
            problem = f"the chat template writes the answer {shortened(form)} differently once turns follow"
            raise RowError("", problem)
        return len(prompt), _behind_thought(prompt, whole, at), at + len(form) + len(self.closing)

    def _ending(self) -> tuple[str, str, str]:
        """Returns what follows an answer: all of it, up to and with the end-of-turn token, and that token."""
        text = self._render(PROBE, False)
        answer = PROBE[-1].content
        if answer not in text:
            raise RowError("", "it does not write out the answer of an assistant's turn")
        tail = text[text.rindex(answer) + len(answer) :]
        found = self.special.search(tail) if self.special else None
        if found is None:
            raise RowError(
                "",
                "it writes no end-of-turn token after an answer, so answers would never end; add {{ "
                "eos_token }}",
            )
        return tail, tail[: found.end()], found.group()

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, chat_template=self.source, tokenize=False, add_generation_prompt=generation
                )
            )
        except TooMuch as error:
            where = (
                f" of {self.tokenizer.name_or_path}"
                if self.name == OWN and self.tokenizer.name_or_path
                else ""
            )
            raise UserError(
                f"data.template={self.name}: the chat template{where} is refused: {error}."
            ) from error
        except TemplateError as error:
            raise RowError("", f"the chat template cannot write it: {error}") from error
        except RecursionError as error:
            raise RowError(
                "", "the chat template cannot write it: it is nested too deeply, or calls itself"
            ) from error
        except Exception as error:  # the template is a program from outside, and may fail in any way
            problem = f"the chat template cannot write it: {type(error).__name__}: {error}"
            raise RowError("", problem) from error


def _behind_thought(prompt: str, whole: str, at: int) -> int:
    """Returns where the loss begins: at the answer's own text (`at`) if only an empty thought stands before
    it, whose tag the prompt may have opened; else where the prompt ends."""
    opened = OPENED.search(prompt[-80:])
    before = whole[len(prompt) : at]
    empty = EMPTY_THOUGHT.fullmatch(before) or (opened and EMPTY_THOUGHT.fullmatch(opened.group() + before))
    return at if before and empty else len(prompt)


def _forms(content: str) -> list[str]:
    """Returns an answer as it may stand in the text: templates often strip it."""
    return [
        form for form in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())) if form
    ]
