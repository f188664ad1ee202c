"""Answers to held-out prompts before and after training, side by side: what a loss does not show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mft.batch import Prompt
from mft.console.markdown import code, fenced
from mft.console.tables import table
from mft.files.json_file import write_json

if TYPE_CHECKING:
    from rich.table import Table


COLUMNS = ("prompt", "after", "before", "expected", "task")
"""Of answers.json; MLflow's page groups runs by the first and compares the second."""


class Answers:
    """Has the model answer twice and writes the answers to report/answers.md and answers.json."""

    def __init__(self, prompts: Sequence[Prompt], answer: Callable[[list[list[dict[str, str]]]], list[str]]):
        """answer: maps conversations to answers with the model as it is now."""
        self.prompts, self.answer = list(prompts), answer
        self.answers: dict[str, list[str]] = {}

    def ask(self, when: str) -> None:
        """Remembers the model's present answers as `before` or `after`."""
        self.answers[when] = self.answer([prompt.messages for prompt in self.prompts])

    def table(self) -> Table:
        """Returns a rich table, a row per prompt: the question's end, the answers, the expected one."""
        rows = []
        for number, prompt in enumerate(self.prompts):
            answers = [texts[number] for texts in self.answers.values()]
            cells = [prompt.messages[-1]["content"][-240:], *answers, prompt.expected]
            rows.append([prompt.task, *map(_first_lines, cells)])
        columns = ["task", "asked (its end)", *self.answers, "expected"]
        return table("One answer per task", columns, rows, lines=True)

    def write(self, path: Path) -> None:
        """Writes prompts and full answers as Markdown, and beside it as a table in JSON.

        The table, path with the suffix .json, is {"columns": […], "data": [[…], …]} with COLUMNS; an answer
        that was not asked for is empty.
        """
        parts = ["# Answers\n"]
        for number, prompt in enumerate(self.prompts):
            parts.append(f"## {code(prompt.task)}\n")
            parts += [f"**{code(m['role'])}**\n\n{fenced(m['content'])}\n" for m in prompt.messages]
            texts = {when: answers[number] for when, answers in self.answers.items()}
            texts["expected"] = prompt.expected
            parts += [f"**{title}**\n\n{fenced(text)}\n" for title, text in texts.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts), encoding="utf-8")
        if self.prompts:
            write_json(path.with_suffix(".json"), {"columns": list(COLUMNS), "data": self._rows()})

    def _rows(self) -> list[list[str]]:
        rows = []
        for number, prompt in enumerate(self.prompts):
            turns = prompt.messages
            asked = turns[0]["content"] if len(turns) == 1 else "\n\n".join(map(_turn, turns))
            answers = (self.answers.get(when) for when in ("after", "before"))
            given = ["" if texts is None else texts[number] for texts in answers]
            rows.append([asked, *given, prompt.expected, prompt.task])
        return rows


def _turn(message: Mapping[str, str]) -> str:
    return f"{message['role']}: {message['content']}"


def _first_lines(text: str, lines: int = 12) -> str:
    first = text.strip("\n").splitlines()
    return "\n".join(first[:lines]) + ("\n…" if len(first) > lines else "")
