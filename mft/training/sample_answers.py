"""Answers to held-out prompts before and after training, side by side: what a loss does not show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mft.batch import Prompt


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
