"""Answers to held-out prompts before and after training, side by side: what a loss does not show."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.errors import UserError, shortened

ROLES = {"human": "user", "bot": "assistant"}


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered.

    task: where it is from; messages: role and content; expected: a reference answer or "".
    """

    task: str
    messages: list[dict[str, str]]
    expected: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a JSONL file of prompts: chatML rows (`chat_rounds`); a last bot turn is the expected answer.

    Raises UserError with file and line for a row that cannot be read.
    """
    if not path.is_file():
        raise UserError(f"train.prompts={path} is not a file.")
    prompts = []
    # split at line feeds alone: the text of a row may hold the line separators of Unicode
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            turns = _turns(row)
        except UnicodeDecodeError as error:
            where = f"byte {line[error.start : error.start + 1]!r} at byte {error.start} of the line"
            raise UserError(f"train.prompts: {path}:{number}: is not UTF-8: {where}.") from error
        except (ValueError, RecursionError) as error:
            shown = shortened(line.decode(errors="replace"))
            raise UserError(f"train.prompts: {path}:{number}: is not a chatML row ({error}): {shown}") from error
        expected = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
        prompts.append(Prompt(str(row.get("data_name", "")), turns, expected))
    if not prompts:
        raise UserError(f"train.prompts={path} holds no prompts.")
    return prompts


def _turns(row: Any) -> list[dict[str, str]]:
    """Returns the turns of a row; raises ValueError that says what is wrong with it."""
    rounds = row.get("chat_rounds") if isinstance(row, dict) else None
    if not isinstance(rounds, list):
        raise ValueError("an object with the list chat_rounds is expected")
    turns = []
    for i, turn in enumerate(rounds):
        role, content = (turn.get(key) if isinstance(turn, dict) else None for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"chat_rounds[{i}]: an object with the texts role and content is expected")
        if (role := ROLES.get(role, role)) not in ("system", "user", "assistant"):
            raise ValueError(f"chat_rounds[{i}].role: system, human (user) or bot (assistant) is expected")
        turns.append({"role": role, "content": content})
    if "user" not in [turn["role"] for turn in turns]:
        raise ValueError("chat_rounds: a human turn to be answered is expected")
    return turns


class Answers:
    """Asks the model twice and writes what it said to report/answers.md."""

    def __init__(self, prompts: Sequence[Prompt], answer: Callable[[list[list[dict[str, str]]]], list[str]]):
        """answer: maps conversations to answers with the model as it is now."""
        self.prompts, self.answer = list(prompts), answer
        self.said: dict[str, list[str]] = {}

    def ask(self, when: str) -> None:
        """Remembers the model's present answers as `before` or `after`."""
        if self.prompts:
            self.said[when] = self.answer([prompt.messages for prompt in self.prompts])

    def table(self) -> Any:
        """Returns a rich table, a row per prompt: the question's end, the answers, the expected one."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="One answer per task", title_justify="left", show_lines=True, expand=True)
        for title in ("task", "asked (its end)", *self.said, "expected"):
            table.add_column(title, ratio=None if title == "task" else 1, overflow="fold")
        for number, prompt in enumerate(self.prompts):
            cells = [
                prompt.messages[-1]["content"][-240:],
                *(said[number] for said in self.said.values()),
                prompt.expected,
            ]
            table.add_row(Text(prompt.task), *(Text(_first_lines(cell)) for cell in cells))
        return table

    def write(self, path: Path) -> None:
        """Writes prompts and whole answers as Markdown."""
        parts = ["# Answers\n"]
        for number, prompt in enumerate(self.prompts):
            parts.append(f"## {prompt.task}\n")
            parts += [f"**{m['role']}**\n\n```\n{m['content']}\n```\n" for m in prompt.messages]
            parts += [f"**{when}**\n\n```\n{said[number]}\n```\n" for when, said in self.said.items()]
            parts.append(f"**expected**\n\n```\n{prompt.expected}\n```\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts), encoding="utf-8")


def _first_lines(text: str, lines: int = 12) -> str:
    rows = text.strip("\n").splitlines()
    return "\n".join(rows[:lines]) + ("\n…" if len(rows) > lines else "")
