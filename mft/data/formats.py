"""What a row means: parsed JSON → messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.batch import Message
from mft.errors import UserError, nearest, shortened


class RowError(UserError):
    """A row that cannot be understood: where it is, which field, what is wrong with it.

    file and line are None until the reader of the file fills them in with `at`; field is "" for the row as a whole.
    """

    def __init__(self, field: str, problem: str, file: Path | None = None, line: int | None = None):
        self.field, self.problem, self.file, self.line = field, problem, file, line
        place = f"{file}:{line}: " if file is not None else ""
        super().__init__(f"{place}{field}: {problem}" if field else f"{place}{problem}")

    def at(self, file: Path, line: int) -> RowError:
        """Returns the same error with its place."""
        return RowError(self.field, self.problem, file, line)


class Format:
    """Turns the parsed rows of one task into conversations. Subclasses are dataclasses of plain values.

    Their repr is part of the token cache's fingerprint, so every value that changes the result must be a field.
    """

    def messages(self, row: Any) -> list[Message]:
        """Returns the conversation of a row, roles system, user and assistant; raises RowError naming the field."""
        raise NotImplementedError


ROLES = {"system": "system", "human": "user", "user": "user", "bot": "assistant", "assistant": "assistant"}
"""Role names in rows → roles of messages."""


@dataclass
class Chat(Format):
    """chatML: `chat_rounds` is a list of `{"role", "content"}`, roles system/human/bot or system/user/assistant.

    An optional system turn comes first, then user and assistant turns alternate. A bot turn with `"train": false`
    carries no loss. Other fields are ignored.
    """

    def messages(self, row: Any) -> list[Message]:
        if not isinstance(row, dict):
            raise RowError("", f"is {_kind(row)} {shortened(row)}; allowed: an object with the field chat_rounds")
        if "chat_rounds" not in row:
            fields = ", ".join(list(row)[:8]) or "none"
            raise RowError("chat_rounds", f"is missing; the row's fields: {shortened(fields)}{_instead(row)}")
        rounds = row["chat_rounds"]
        if not isinstance(rounds, list) or not rounds:
            raise RowError(
                "chat_rounds", f"is {_kind(rounds)} {shortened(rounds)}; allowed: a list of at least one round"
            )
        messages: list[Message] = []
        for number, turn in enumerate(rounds):
            messages.append(self._message(turn, f"chat_rounds[{number}]", messages))
        if messages[-1].role == "system":
            raise RowError("chat_rounds", "holds only a system turn; a human turn must follow")
        return messages

    def _message(self, turn: Any, field: str, before: list[Message]) -> Message:
        if not isinstance(turn, dict):
            raise RowError(field, f"is {_kind(turn)} {shortened(turn)}; allowed: an object with role and content")
        for key in ("role", "content"):
            if key not in turn:
                raise RowError(f"{field}.{key}", f"is missing; the round's fields: {shortened(', '.join(turn))}")
            if not isinstance(turn[key], str):
                raise RowError(f"{field}.{key}", f"is {_kind(turn[key])} {shortened(turn[key])}; allowed: text")
        role, content, train = turn["role"], turn["content"], turn.get("train", True)
        expected = ["human", "user"] if not before or before[-1].role != "user" else ["bot", "assistant"]
        allowed = expected if before else ["system", *expected]
        if role not in allowed:
            hint = nearest(role, allowed) if role not in ROLES else "; human and bot turns alternate"
            problem = f"{shortened(role)} is not allowed here; allowed: {', '.join(allowed)}{hint}"
            raise RowError(f"{field}.role", problem)
        if not isinstance(train, bool):
            raise RowError(f"{field}.train", f"is {_kind(train)} {shortened(train)}; allowed: true, false")
        if ROLES[role] == "assistant" and not content:
            raise RowError(f"{field}.content", "is empty; a bot turn needs text to learn")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{field}.content", f"holds half of a surrogate pair at character {error.start}, which is no text"
            ) from None
        return Message(ROLES[role], content, train)


def _kind(value: Any) -> str:
    """Returns what JSON calls the type of a value."""
    names = {dict: "the object", list: "the list", str: "the text", bool: "the boolean", type(None): "the value"}
    return names.get(type(value), "the number")


def _instead(row: dict[str, Any]) -> str:
    return nearest("chat_rounds", row)
