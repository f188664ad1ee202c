"""Answers before and after training, as Markdown and as a table."""

import json

from mft.batch import Prompt
from mft.training.sample_answers import COLUMNS, Answers

ASKED = [
    {"role": "human", "content": "one"},
    {"role": "bot", "content": "1"},
    {"role": "human", "content": "two"},
]


def test_the_table_has_a_row_for_each_prompt(tmp_path):
    prompts = [Prompt("sql", ASKED[:1], "1"), Prompt("<b>|", ASKED, "2")]
    answers = Answers(prompts, lambda conversations: [f"{len(turns)} turns" for turns in conversations])
    answers.ask("before")
    answers.write(tmp_path / "report" / "answers.md")  # of a run that was stopped: none after
    table = json.loads((tmp_path / "report" / "answers.json").read_text())
    assert table["columns"] == list(COLUMNS) == ["prompt", "after", "before", "expected", "task"]
    assert table["data"][0] == ["one", "", "1 turns", "1", "sql"]
    assert table["data"][1] == ["human: one\n\nbot: 1\n\nhuman: two", "", "3 turns", "2", "<b>|"]


def test_no_prompt_makes_no_table(tmp_path):
    Answers([], lambda _: []).write(tmp_path / "answers.md")
    assert not (tmp_path / "answers.json").exists()


def test_an_answer_cannot_leave_its_block(tmp_path):
    answers = Answers([Prompt("a`\n# b", ASKED[:1], "1")], lambda _: ["```\n# <script>"])
    answers.ask("after")
    answers.write(tmp_path / "answers.md")
    text = (tmp_path / "answers.md").read_text()
    assert "````\n```\n# <script>\n````" in text and "\n## `` a` # b ``\n" in text
