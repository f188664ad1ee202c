"""The style of every table: title on the left, text that folds, right-aligned numbers that never break.

On a narrow terminal a table has fewer columns rather than broken words, see `fitted`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


LONGEST_WORD = 24
"""Columns of a word that is kept whole; a longer one, such as an address, is broken where it has to be."""


class Fitted(NamedTuple):
    """The part of a table that a terminal has room for."""

    columns: list[str]
    rows: list[list[object]]
    widths: list[int | None]
    """Of each column; None where none of its cells has to be folded."""
    left_out: list[str]
    """Columns that had no room."""
    whole_words: bool
    """Whether no word is broken."""


def fitted(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    width: int,
    whole: Collection[str] = (),
    spare: Sequence[str] = (),
) -> Fitted:
    """Returns a table that is at most `width` wide, without the columns that have no room.

    whole: columns whose cells stay on one line; spare: those that may be left out, the first one first.
    """
    from rich.cells import cell_len

    cells = [[name, *(str(row[place]) for row in rows)] for place, name in enumerate(columns)]
    wide = [max(map(cell_len, of)) for of in cells]
    words = [max(cell_len(word) for cell in of for word in cell.split() or [""]) for of in cells]
    least = [
        wide[place] if name in whole else min(words[place], LONGEST_WORD)
        for place, name in enumerate(columns)
    ]

    def missing(places: Sequence[int], widths: Sequence[int]) -> int:
        return sum(widths[place] + 3 for place in places) + 1 - width  # a line and two spaces for each

    # what is empty is not missed
    kept = [place for place, name in enumerate(columns) if name not in spare or any(cells[place][1:])]
    left_out = []
    for place in [place for name in spare for place in kept if columns[place] == name]:
        if missing(kept, least) > 0:
            kept.remove(place)
            left_out.append(columns[place])
    widths = list(least)
    while folding := [place for place in kept if widths[place] < wide[place]]:
        if missing(kept, widths) >= 0:
            break
        widths[max(folding, key=lambda place: wide[place] / widths[place])] += 1  # the one with most lines
    fits = missing(kept, least) <= 0
    return Fitted(
        [columns[place] for place in kept],
        [[row[place] for place in kept] for row in rows],
        # where nothing fits, rich shares out what there is
        [widths[place] if fits and widths[place] < wide[place] else None for place in kept],
        left_out,
        fits,
    )


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]] = (),
    numbers: Collection[str] = (),
    total: Sequence[object] | None = None,
    styles: Iterable[str | None] = (),
    lines: bool = False,
    widths: Sequence[int | None] = (),
) -> Table:
    """Returns a table of rich.

    columns: their headers; numbers: those of them whose cells are right-aligned and stay on one line; rows: a
    cell for each column, text or a rich Text (plain text is not markup); total: a last row, below a line;
    styles: of each row; lines: whether a line parts the rows, for cells of several lines; widths:
    of the columns, as `fitted` finds them.
    """
    from rich.table import Table

    result = Table(title=_cell(title, "italic"), title_justify="left", show_lines=lines, expand=lines)
    for column, width in zip_longest(columns, widths):
        if column in numbers:
            result.add_column(column, justify="right", no_wrap=True)
        else:
            result.add_column(column, overflow="fold", width=width)
    of_row = iter(styles)
    for row in rows:
        result.add_row(*map(_cell, row), style=next(of_row, None))
    if total is not None:
        result.add_section()
        result.add_row(*map(_cell, total))
    return result


def settings_table(rows: Iterable[tuple[str, object]], title: str) -> Table:
    """Returns two columns without lines: names and values, which may be rich Texts."""
    from rich.table import Table

    result = Table(
        title=_cell(title, "italic"), show_header=False, title_justify="left", box=None, padding=(0, 2)
    )
    for name, value in rows:
        result.add_row(_cell(name, "dim"), _cell(value))
    return result


def pasted(rows: Iterable[tuple[str, object]], title: str) -> Text:
    """Returns names and values to be printed with soft_wrap: nothing breaks a command or an address that a
    person copies."""
    from rich.text import Text

    rows = list(rows)
    names = max((len(name) for name, _ in rows), default=0) + 4
    lines = [_cell(title, "italic")]
    for name, value in rows:
        lines.append(Text.assemble((f"  {name}".ljust(names + 2), "dim"), _cell(value)))
    return Text("\n").join(lines)


def _cell(value: object, style: str = "") -> Text:
    from rich.text import Text

    # A Text has no markup, so that brackets in names of tasks and files are shown as they are.
    return value if isinstance(value, Text) else Text(str(value), style=style)
