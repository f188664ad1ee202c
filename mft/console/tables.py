"""The style of every table: title on the left, text that folds, right-aligned numbers that never break."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]] = (),
    numbers: Collection[str] = (),
    total: Sequence[object] | None = None,
    styles: Iterable[str | None] = (),
    lines: bool = False,
) -> Table:
    """Returns a table of rich.

    columns: their headers; numbers: those of them whose cells are right-aligned and stay on one line; rows: a
    cell for each column, text or a rich Text (plain text is not markup); total: a last row, below a line;
    styles: of each row; lines: whether a line parts the rows, for cells of several lines.
    """
    from rich.table import Table

    result = Table(title=_cell(title, "italic"), title_justify="left", show_lines=lines, expand=lines)
    for column in columns:
        if column in numbers:
            result.add_column(column, justify="right", no_wrap=True)
        else:
            result.add_column(column, overflow="fold")
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


def _cell(value: object, style: str = "") -> Text:
    from rich.text import Text

    # A Text has no markup, so that brackets in names of tasks and files are shown as they are.
    return value if isinstance(value, Text) else Text(str(value), style=style)
