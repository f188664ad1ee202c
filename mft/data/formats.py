"""What a row means: parsed JSON → messages. Which format fits a task's rows: `detection`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

from mft.batch import Message
from mft.data import row_fields
from mft.data.row_fields import RowError, carries_loss, left_over, must_be, optional_text, required, text_of
from mft.errors import nearest, shortened


class Format(ABC):
    """Turns the parsed rows of one task into conversations. Subclasses are dataclasses of plain values.

    Their repr is part of the token cache's fingerprint, so every value that changes the result must be a
    field.
    """

    @abstractmethod
    def messages(self, row: Any) -> list[Message]:
        """Returns the conversation of a row, roles system, user and assistant; raises RowError."""

    def unread(self, row: Any) -> Iterable[str] | None:
        """Returns the fields of an understood row that `messages` ignores though they carry text, a list or
        an object, e.g. `tools` and `messages[].name`; None where the format does not say what it reads."""
        return None

    def describe(self) -> str:
        """Returns its name in reports."""
        return type(self).__name__.lower()


class Turns(Format):
    """A list of turns, one object each. The class variables are the names of fields and roles.

    An optional system turn comes first, then user and assistant turns alternate. An assistant turn with
    `"train": false`, `"weight": 0` or `"loss_mask": 0` carries no loss; other fields that could say so are
    refused.
    """

    FIELD: ClassVar[str]
    ROLE: ClassVar[str] = "role"
    CONTENT: ClassVar[str] = "content"
    BESIDE: ClassVar[Sequence[str]] = ()
    """Fields read beside the list."""
    ONE: ClassVar[str] = "turn"
    """What errors call a turn."""
    SYSTEM: ClassVar[Sequence[str]] = ("system",)
    USER: ClassVar[Sequence[str]] = ("user",)
    ASSISTANT: ClassVar[Sequence[str]] = ("assistant",)

    def fits(self, row: object) -> TypeGuard[dict[str, Any]]:
        """Whether a row has the field that marks this format, whatever stands in it."""
        return isinstance(row, dict) and isinstance(row.get(self.FIELD), list)

    def messages(self, row: Any) -> list[Message]:
        turns = required(row, self.FIELD)
        if not isinstance(turns, list) or not turns:
            raise must_be(self.FIELD, f"a list of at least one {self.ONE}", turns)
        # There it would look as if the whole conversation were left out of the loss.
        if row.get("train") is False or row.get("loss_mask") == 0:
            field = "train" if row.get("train") is False else "loss_mask"
            raise RowError(field, f"is not read beside {self.FIELD}; write it into each {self.ONE}")
        messages: list[Message] = []
        for number, turn in enumerate(turns):
            messages.append(self._message(turn, f"{self.FIELD}[{number}]", messages))
        if messages[-1].role == "system":
            raise RowError(self.FIELD, f"holds only a system turn; a {self.USER[0]} turn must follow")
        return messages

    def _message(self, turn: Any, place: str, before: list[Message]) -> Message:
        role = required(turn, self.ROLE, place, self.ONE)
        content = required(turn, self.CONTENT, place, self.ONE)
        if not isinstance(role, str):
            raise must_be(f"{place}.{self.ROLE}", "text", role)
        text = self._text(content, f"{place}.{self.CONTENT}")
        # Turns alternate, so the turn before decides what this one must be, whatever it calls itself.
        answers = bool(before) and before[-1].role == "user"
        expected = self.ASSISTANT if answers else self.USER
        allowed = expected if before else (*self.SYSTEM, *expected)
        if role not in allowed:
            problem = f"{shortened(role)} is not allowed here; allowed: {', '.join(allowed)}"
            if role in (*self.SYSTEM, *self.USER, *self.ASSISTANT):
                hint = f"; {self.USER[0]} and {self.ASSISTANT[0]} turns alternate"
            else:
                hint = nearest(role, allowed)
            raise RowError(f"{place}.{self.ROLE}", problem + hint)
        # Loss fields are checked in every turn, but only an answer is trained, and only it may be refused.
        trained = carries_loss(turn, place=f"{place}.")
        if answers and trained:
            row_fields.refuse_unclear_loss(turn, f"{place}.")
        if answers and not text:
            raise RowError(f"{place}.{self.CONTENT}", f"is empty; a {expected[0]} turn needs text to learn")
        return Message("assistant" if answers else "system" if role in self.SYSTEM else "user", text, trained)

    def _text(self, content: object, field: str) -> str:
        return text_of(content, field)

    def unread(self, row: Any) -> Iterable[str] | None:
        fields = left_over(row, (self.FIELD, *self.BESIDE))
        for turn in row[self.FIELD]:
            if len(turn) > 2:  # most turns hold a role and content alone, and nothing is to be looked for
                read = (self.ROLE, self.CONTENT, *row_fields.LOSS_VALUES)
                fields |= left_over(turn, read, f"{self.FIELD}[].")
            if isinstance(turn[self.CONTENT], list):
                for part in turn[self.CONTENT]:
                    fields |= left_over(part, ("type", "text"), f"{self.FIELD}[].{self.CONTENT}[].")
        return fields


@dataclass
class Chat(Turns):
    """chatML: `chat_rounds` is a list of `{"role", "content"}`, roles system/human/bot or
    system/user/assistant."""

    public_name: ClassVar[str] = "chat"
    FIELD = "chat_rounds"
    ONE = "round"
    USER = ("human", "user")
    ASSISTANT = ("bot", "assistant")


@dataclass
class Messages(Turns):
    """OpenAI's form: `messages` is a list of `{"role", "content"}`, roles system (or
    developer)/user/assistant.

    content may be a list of text parts, `[{"type": "text", "text": "..."}]`, which are joined.
    """

    public_name: ClassVar[str] = "messages"
    FIELD = "messages"
    ONE = "message"
    SYSTEM = ("system", "developer")

    def _text(self, content: object, field: str) -> str:
        if not isinstance(content, list):
            return text_of(content, field)
        texts = []
        for number, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
                raise must_be(f"{field}[{number}]", '{"type": "text", "text": "..."}', part)
            texts.append(text_of(part["text"], f"{field}[{number}].text"))
        return "".join(texts)


@dataclass
class ShareGPT(Turns):
    """ShareGPT: `conversations` is a list of `{"from", "value"}`, from = system, human (or user), gpt (or
    assistant).

    A field `system` beside the list is the system turn.
    """

    public_name: ClassVar[str] = "sharegpt"
    FIELD = "conversations"
    ROLE = "from"
    CONTENT = "value"
    BESIDE = ("system",)
    USER = ("human", "user")
    ASSISTANT = ("gpt", "assistant", "bot", "chatgpt")

    def messages(self, row: Any) -> list[Message]:
        messages = super().messages(row)
        system = optional_text(row, "system")
        if system and messages[0].role == "system":
            raise RowError("system", "stands beside a system turn in conversations; remove one of them")
        return [Message("system", system), *messages] if system else messages


@dataclass
class Pair(Format):
    """A question and its answer in two fields, e.g. prompt and answer; its values are the names of fields.

    `"train": false` or `"loss_mask": 0` takes the answer out of the loss.
    """

    public_name: ClassVar[str] = "pair"

    prompt: str = "prompt"
    """Field of the question."""
    answer: str = "answer"
    """Field of the answer."""
    system: str = "system"
    """Field of an optional system text; "" = there is none."""
    input: str = ""
    """Field of optional further input, put on a new line below the question; "" = there is none."""

    def describe(self) -> str:
        return f"{self.prompt}/{self.answer}"

    def fits(self, row: object) -> TypeGuard[dict[str, Any]]:
        """See `Turns.fits`."""
        return isinstance(row, dict) and self.prompt in row and self.answer in row

    def messages(self, row: Any) -> list[Message]:
        question = text_of(required(row, self.prompt), self.prompt)
        answer = text_of(required(row, self.answer), self.answer)
        if not answer:
            raise RowError(self.answer, "is empty; an answer needs text to learn")
        if self.input and (further := optional_text(row, self.input)):
            question = f"{question}\n{further}" if question else further
        # `weight` is a field of OpenAI's turns; beside a pair it may mean anything, so it is left unread.
        trained = carries_loss(row, ["train"]) and carries_loss(row, ["loss_mask"])
        turns = [Message("user", question, pair=True), Message("assistant", answer, trained, pair=True)]
        system = optional_text(row, self.system) if self.system else ""
        return [Message("system", system, pair=True), *turns] if system else turns

    def unread(self, row: Any) -> Iterable[str] | None:
        return left_over(row, (self.prompt, self.answer, self.system, self.input, "train", "loss_mask"))


@dataclass
class Text(Format):
    """Plain text for continued pretraining; every token carries loss."""

    public_name: ClassVar[str] = "text"

    field: str = "text"
    """Field of the text."""

    def fits(self, row: object) -> TypeGuard[dict[str, Any]]:
        """See `Turns.fits`."""
        return isinstance(row, dict) and self.field in row

    def messages(self, row: Any) -> list[Message]:
        text = text_of(required(row, self.field), self.field)
        if not text:
            raise RowError(self.field, "is empty; there is nothing to learn")
        return [Message("text", text)]

    def unread(self, row: Any) -> Iterable[str] | None:
        return left_over(row, (self.field,))


@dataclass
class Auto(Format):
    """One of KNOWN, found once for a task by its rows (`detection`)."""

    public_name: ClassVar[str] = "auto"

    def messages(self, row: Any) -> list[Message]:
        raise AssertionError("the format of a task is known before its rows are read")


KNOWN: dict[str, Turns | Pair | Text] = {
    "chat": Chat(),
    "messages": Messages(),
    "sharegpt": ShareGPT(),
    "prompt_answer": Pair("prompt", "answer"),
    "prompt_response": Pair("prompt", "response"),
    "instruction_output": Pair("instruction", "output", input="input"),
    "instruction_response": Pair("instruction", "response", input="input"),
    "input_output": Pair("input", "output"),
    "question_response": Pair("question", "response"),
    "question_answer": Pair("question", "answer"),
    "query_answer": Pair("query", "answer"),
    "prompt_completion": Pair("prompt", "completion"),
    "text": Text(),
}
"""The formats of conf/format by name. Where the fields of a row fit several, the first one is meant."""
