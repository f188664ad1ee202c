"""A table keeps its words whole on any terminal that has room for them."""

from __future__ import annotations

import io

import pytest

from mft.console.screen import PLAIN_WIDTH, console
from mft.console.tables import fitted, table

HEAD = ["folder", "mean", "of each task", "empty", "verdict"]
ROWS = [
    ["multirun/demo/bb999ef4a6", "6.1918 ± 0.0027", "docs 6.2005 · code 6.1831", "", "lowest"],
    ["multirun/demo/756533fab5", "6.1920 ± 0.0028", "docs 6.2007 · code 6.1833", "", "not told apart"],
]


def drawn(width: int) -> tuple[str, list[str]]:
    """Returns what a terminal of a width shows, and the columns it had no room for."""
    shown = fitted(HEAD, ROWS, width, {"folder", "mean"}, ["empty", "of each task", "mean"])
    screen = console(file=io.StringIO(), width=width)
    screen.print(table("two", shown.columns, shown.rows, widths=shown.widths))
    return screen.file.getvalue(), shown.left_out  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(200, []), (80, []), (64, ["of each task"]), (56, ["of each task"]), (45, ["of each task", "mean"])],
)
def test_columns_are_left_out_before_a_word_is_broken(width: int, left_out: list[str]) -> None:
    text, missing = drawn(width)
    lines = text.splitlines()
    assert missing == left_out and max(map(len, lines)) <= width and "empty" not in text
    assert all(row[0] in text for row in ROWS)
    words = {word for row in [HEAD, *ROWS] for word in " ".join(row).split()}
    seen = {word for line in lines[1:] for word in line.replace("│", " ").replace("┃", " ").split()}
    assert {word for word in seen if word[0].isalnum()} <= words


def test_where_nothing_fits_words_are_broken_and_nothing_is_lost() -> None:
    text, _ = drawn(24)
    assert max(map(len, text.splitlines())) <= 24
    assert "".join(line.split("│")[1].strip() for line in text.splitlines() if "│" in line).startswith(
        "multirun/demo"
    )


def test_output_that_is_no_terminal_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console(file=io.StringIO()).width == PLAIN_WIDTH
    monkeypatch.setenv("COLUMNS", "80")
    assert console(file=io.StringIO()).width == 80
