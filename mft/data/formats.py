"""What a row means: parsed JSON → messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mft.batch import Message
from mft.data.unread import NOTHING, carries, left_over
from mft.errors import UserError, nearest, shortened


class RowError(UserError):
    """A row that cannot be understood: where it is, which field, what is wrong with it.

    file and line are None until the reader of the file fills them in with `at`; field is "" for the row as a
    whole; text: the row as it stands in the file, where it could not even be parsed.
    """

    def __init__(
        self, field: str, problem: str, file: Path | None = None, line: int | None = None, text: str = ""
    ):
        self.field, self.problem, self.file, self.line, self.text = field, problem, file, line, text
        place = f"{file}:{line}: " if file is not None else ""
        super().__init__(f"{place}{field}: {problem}" if field else f"{place}{problem}")

    def at(self, file: Path, line: int) -> RowError:
        """Returns the same error with its place."""
        return RowError(self.field, self.problem, file, line, self.text)

    def advised(self) -> RowError:
        """Returns the same error with what may be done where other rows are sound."""
        problem = f"{self.problem} (data.bad_rows=skip leaves such rows out and counts them)"
        return RowError(self.field, problem, self.file, self.line, self.text)


class Format(ABC):
    """Turns the parsed rows of one task into conversations. Subclasses are dataclasses of plain values.

    Their repr is part of the token cache's fingerprint, so every value that changes the result must be a
    field.
    """

    @abstractmethod
    def messages(self, row: Any) -> list[Message]:
        """Returns the conversation of a row, roles system, user and assistant; raises RowError naming the
        field."""

    def unread(self, row: Any) -> Iterable[str] | None:
        """Returns the names of the fields of an understood row that `messages` does not read though they
        carry text, a list or an object, e.g. `tools` and `messages[].name`; None where the format does not
        say what it reads."""
        return None

    def describe(self) -> str:
        """Returns the name by which reports call it."""
        return type(self).__name__.lower()

    def fits(self, row: Any) -> bool:
        """Whether a row has the fields that mark this format; says nothing about their values."""
        raise NotImplementedError


class Turns(Format):
    """A list of turns, one object each. The class variables say how the fields and the roles are called.

    An optional system turn comes first, then user and assistant turns alternate. A turn of the assistant with
    `"train": false`, `"weight": 0` or `"loss_mask": 0` carries no loss; other fields that would say so are
    refused. All further fields are left unread, and named by `unread`.
    """

    FIELD: ClassVar[str]
    ROLE: ClassVar[str] = "role"
    CONTENT: ClassVar[str] = "content"
    BESIDE: ClassVar[Sequence[str]] = ()  # fields read beside the list
    ONE: ClassVar[str] = "turn"
    SYSTEM: ClassVar[Sequence[str]] = ("system",)
    USER: ClassVar[Sequence[str]] = ("user",)
    ASSISTANT: ClassVar[Sequence[str]] = ("assistant",)

    def fits(self, row: Any) -> bool:
        return isinstance(row, dict) and isinstance(row.get(self.FIELD), list)

    def messages(self, row: Any) -> list[Message]:
        if not isinstance(row, dict):
            raise RowError(
                "", f"is {_kind(row)} {shortened(row)}; allowed: an object with the field {self.FIELD}"
            )
        turns = _field(row, self.FIELD)
        if not isinstance(turns, list) or not turns:
            problem = f"is {_kind(turns)} {shortened(turns)}; allowed: a list of at least one {self.ONE}"
            raise RowError(self.FIELD, problem)
        if len(row) > 1 and (row.get("train") is False or row.get("loss_mask") == 0):
            field = "train" if row.get("train") is False else "loss_mask"
            raise RowError(
                field, f"stands beside {self.FIELD}, where it is not read; write it into each {self.ONE}"
            )
        messages: list[Message] = []
        for number, turn in enumerate(turns):
            messages.append(self._message(turn, f"{self.FIELD}[{number}]", messages))
        if messages[-1].role == "system":
            raise RowError(self.FIELD, f"holds only a system turn; a {self.USER[0]} turn must follow")
        return messages

    def unread(self, row: Any) -> Iterable[str] | None:
        turns = row[self.FIELD]
        found = left_over(row, (self.FIELD, *self.BESIDE)) if len(row) > 1 else NOTHING
        for turn in turns:
            if len(turn) > 2:  # more than role and content, which are there
                found = found | left_over(turn, (self.ROLE, self.CONTENT, *READ_LOSS), f"{self.FIELD}[].")
            if isinstance(turn[self.CONTENT], list):
                for part in turn[self.CONTENT]:
                    found = found | left_over(part, ("type", "text"), f"{self.FIELD}[].{self.CONTENT}[].")
        return found

    def _message(self, turn: Any, field: str, before: list[Message]) -> Message:
        if not isinstance(turn, dict):
            problem = (
                f"is {_kind(turn)} {shortened(turn)}; allowed: an object with {self.ROLE} and {self.CONTENT}"
            )
            raise RowError(field, problem)
        for key in (self.ROLE, self.CONTENT):
            if key not in turn:
                fields = shortened(", ".join(turn))
                raise RowError(f"{field}.{key}", f"is missing; the {self.ONE}'s fields: {fields}")
        role = turn[self.ROLE]
        if not isinstance(role, str):
            raise RowError(f"{field}.{self.ROLE}", f"is {_kind(role)} {shortened(role)}; allowed: text")
        content = self._content(turn[self.CONTENT], f"{field}.{self.CONTENT}")
        assistant = bool(before) and before[-1].role == "user"
        expected = self.ASSISTANT if assistant else self.USER
        allowed = list(expected) if before else [*self.SYSTEM, *expected]
        if role not in allowed:
            known = role in (*self.SYSTEM, *self.USER, *self.ASSISTANT)
            hint = (
                f"; {self.USER[0]} and {self.ASSISTANT[0]} turns alternate"
                if known
                else nearest(role, allowed)
            )
            problem = f"{shortened(role)} is not allowed here; allowed: {', '.join(allowed)}{hint}"
            raise RowError(f"{field}.{self.ROLE}", problem)
        train = len(turn) == 2 or _trained(turn, field, assistant)
        if assistant and not content:
            raise RowError(
                f"{field}.{self.CONTENT}", f"is empty; a {self.ASSISTANT[0]} turn needs text to learn"
            )
        meaning = "assistant" if assistant else "system" if role in self.SYSTEM else "user"
        return Message(meaning, content, train)

    def _content(self, value: Any, field: str) -> str:
        return _text(value, field)


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

    def _content(self, value: Any, field: str) -> str:
        if not isinstance(value, list):
            return _text(value, field)
        texts = []
        for number, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
                problem = f'is {_kind(part)} {shortened(part)}; allowed: {{"type": "text", "text": "..."}}'
                raise RowError(f"{field}[{number}]", problem)
            texts.append(_text(part["text"], f"{field}[{number}].text"))
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
        system = _optional(row, "system")
        if system and messages[0].role == "system":
            raise RowError("system", "stands beside a system turn in conversations; one of them must go")
        return [Message("system", system), *messages] if system else messages


@dataclass
class Pair(Format):
    """A question and its answer in two fields, e.g. prompt and answer; the names of the fields are the
    values.

    system: field of an optional system text; input: field of optional further input, put on a new line below
    the question ("" = there is none). `"train": false` or `"loss_mask": 0` takes the answer out of the loss.
    Further fields are left unread, and named by `unread`.
    """

    public_name: ClassVar[str] = "pair"

    prompt: str = "prompt"
    answer: str = "answer"
    system: str = "system"
    input: str = ""

    def describe(self) -> str:
        return f"{self.prompt}/{self.answer}"

    def fits(self, row: Any) -> bool:
        return isinstance(row, dict) and self.prompt in row and self.answer in row

    def messages(self, row: Any) -> list[Message]:
        if not isinstance(row, dict):
            problem = (
                f"is {_kind(row)} {shortened(row)}; allowed: an object with {self.prompt} and {self.answer}"
            )
            raise RowError("", problem)
        question = _text(_field(row, self.prompt), self.prompt)
        answer = _text(_field(row, self.answer), self.answer)
        if not answer:
            raise RowError(self.answer, "is empty; an answer needs text to learn")
        if self.input and (further := _optional(row, self.input)):
            question = f"{question}\n{further}" if question else further
        train = _train(row, "") and _loss_mask(row, "")
        system = _optional(row, self.system) if self.system else ""
        turns = [("system", system, True)] if system else []
        turns += [("user", question, True), ("assistant", answer, train)]
        return [Message(role, content, trained, pair=True) for role, content, trained in turns]

    def unread(self, row: Any) -> Iterable[str] | None:
        if len(row) == 2:
            return NOTHING
        return left_over(row, (self.prompt, self.answer, self.system, self.input, "train", "loss_mask"))


@dataclass
class Text(Format):
    """Plain text for continued pretraining; every token carries loss. field: the name of its field."""

    public_name: ClassVar[str] = "text"

    field: str = "text"

    def fits(self, row: Any) -> bool:
        return isinstance(row, dict) and self.field in row

    def messages(self, row: Any) -> list[Message]:
        if not isinstance(row, dict):
            raise RowError(
                "", f"is {_kind(row)} {shortened(row)}; allowed: an object with the field {self.field}"
            )
        text = _text(_field(row, self.field), self.field)
        if not text:
            raise RowError(self.field, "is empty; there is nothing to learn")
        return [Message("text", text)]

    def unread(self, row: Any) -> Iterable[str] | None:
        return left_over(row, (self.field,)) if len(row) > 1 else NOTHING


KNOWN: dict[str, Format] = {
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


@dataclass
class Auto(Format):
    """The format is found once for a task: the first of KNOWN that its first recognisable row fits."""

    public_name: ClassVar[str] = "auto"

    def detect(self, row: Any) -> tuple[str, Format] | None:
        """Returns the name and format that a row fits; None for a row that fits none."""
        return next(((name, known) for name, known in KNOWN.items() if known.fits(row)), None)

    def messages(self, row: Any) -> list[Message]:
        raise AssertionError("the format of a task is settled before its rows are read")


QUESTIONS = ("prompt", "instruction", "question", "query", "input", "problem")
ANSWERS = ("answer", "answers", "completion", "response", "output", "solution", "target")

OWN_NAMES = "format: {_target_: mft.data.formats.Pair, prompt: my_question, answer: my_answer}"


def misread(name: str, row: Mapping[str, Any]) -> str:
    """Returns why a row should not be read by the format that Auto found, "" where it may.

    Preferences would be trained as plain answers, the rejected ones among them, and a pair as text with its
    question.
    """
    if carries(row.get("chosen")) and carries(row.get("rejected")):
        return (
            "its rows are preferences (chosen, rejected), which mft does not train; to train on the "
            f"chosen answers alone, name the fields in the task's yaml, e.g. {OWN_NAMES}"
        )
    if name == "prompt_completion" and isinstance(row.get("label"), bool):
        return (
            "its rows are judged completions (prompt, completion, label), and those with label: false "
            "would be trained, too; take them out of the files, and write format: prompt_completion into "
            "the task's yaml"
        )
    sides = [next((f for f in fields if carries(row.get(f))), None) for fields in (QUESTIONS, ANSWERS)]
    if name == "text" and all(sides):
        return (
            f"its rows have a text beside {sides[0]} and {sides[1]}: as plain text the questions would be "
            f"trained, too; name the format in the task's yaml, {OWN_NAMES} or format: text"
        )
    return ""


def no_format(fields: Sequence[str]) -> str:
    """Returns what is said where no row of a task fits a known format; fields: those of its first object."""
    marks = [known.FIELD if isinstance(known, Turns) else known.describe() for known in KNOWN.values()]
    return (
        f"no format fits its rows; fields of the first one: {shortened(', '.join(fields[:12]) or 'none')}. "
        f"Known: {', '.join(marks)}. For other names choose one in the task's yaml, e.g. {OWN_NAMES}"
    )


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        fields = ", ".join(list(row)[:8]) or "none"
        raise RowError(name, f"is missing; the row's fields: {shortened(fields)}{nearest(name, row)}")
    return row[name]


def _optional(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None else _text(value, name)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(field, f"is {_kind(value)} {shortened(value)}; allowed: text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"holds half of a surrogate pair at character {error.start}, which is not text"
        raise RowError(field, problem) from None
    return value


READ_LOSS = ("train", "weight", "loss_mask")
"""Fields of a turn that say whether it carries loss, and are read."""

UNCLEAR_LOSS = ("mask", "loss", "loss_scale", "loss_weight")
"""Fields of a turn that say so in ways that differ between programs."""


def _trained(turn: Mapping[str, Any], field: str, assistant: bool) -> bool:
    """Returns what READ_LOSS says; null is as good as absent (tables have a value in every row).

    Raises RowError where an answer would be trained though UNCLEAR_LOSS may say otherwise.
    """
    train, weight = _train(turn, f"{field}."), turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(
            f"{field}.weight", f"is {_kind(weight)} {shortened(weight)}; allowed: 0 (no loss) and 1"
        )
    train = _loss_mask(turn, f"{field}.") and train and weight != 0
    for name in UNCLEAR_LOSS if assistant and train else ():
        value = turn.get(name)
        if value is not None and (name == "mask" or value != 1):
            problem = (
                f"is {_kind(value)} {shortened(value)} and not read, so the answer would be trained "
                f"whatever it says; "
                'write "train": false into turns without loss, and take the field out'
            )
            raise RowError(f"{field}.{name}", problem)
    return train


def _train(fields: Mapping[str, Any], prefix: str) -> bool:
    train = fields.get("train")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{prefix}train", f"is {_kind(train)} {shortened(train)}; allowed: true, false")
    return train is not False


def _loss_mask(fields: Mapping[str, Any], prefix: str) -> bool:
    mask = fields.get("loss_mask")
    if mask is not None and mask not in (0, 1):  # as numbers or booleans
        problem = f"is {_kind(mask)} {shortened(mask)}; allowed: 0 (no loss) and 1"
        raise RowError(f"{prefix}loss_mask", problem)
    return mask is None or bool(mask)


def _kind(value: Any) -> str:
    """Returns what JSON calls the type of a value."""
    names = {
        dict: "the object",
        list: "the list",
        str: "the text",
        bool: "the boolean",
        type(None): "the value",
    }
    return names.get(type(value), "the number")
