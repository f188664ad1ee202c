"""Tables of the report, which a reader can sort."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from mft.comparison.settings import SEED
from mft.runs.results import Run


class Cell(NamedTuple):
    """One cell. value: what it is sorted by, None: its text; hint: shown where the pointer rests."""

    text: str
    value: float | None = None
    css: str = ""
    hint: str = ""

    @property
    def key(self) -> str:
        """What it is sorted by, "" where that is its text."""
        return "" if self.value is None or PLAIN.fullmatch(self.text) else f"{self.value:.6g}"


PLAIN = re.compile(r"[-+]?\d+(\.\d+)?")
"""Text that a script reads as a number."""


class Head(NamedTuple):
    """The head of a column. group: what stands above it and its neighbours of the same group."""

    text: str
    hint: str = ""
    number: bool = True
    group: str = ""


@dataclass
class Table:
    """A table that can be sorted. fixed: rows that stay on top."""

    heads: list[Head] = field(default_factory=list)
    fixed: list[list[Cell]] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The titles above the heads, with their number of columns; [] without any."""
        found = [(title, len(list(heads))) for title, heads in groupby(self.heads, lambda head: head.group)]
        return found if any(title for title, _ in found) else []

    def without_empty(self) -> Table:
        """Returns the table without columns in which no row has anything."""
        rows = [*self.fixed, *self.rows]
        kept = [place for place in range(len(self.heads)) if any(row[place].text for row in rows)]
        fixed, shown = ([[row[i] for i in kept] for row in of] for of in (self.fixed, self.rows))
        return Table([self.heads[i] for i in kept], fixed, shown, self.note)


def runs_table(runs: Sequence[Run], keys: Sequence[str], limit: int) -> Table:
    """Returns the values that differ, a row for each run."""
    heads = [Head(name, "", False) for name in ("run", "state", *keys)]
    if SEED not in keys:
        heads.append(Head(SEED))
    names = [head.text for head in heads[2:]]
    rows = [
        [
            Cell(run.name, None, "", run.where),
            Cell(run.state),
            *(Cell(run.values.get(key, "-")) for key in names),
        ]
        for run in runs[:limit]
    ]
    note = (
        f"The first {limit:,} of {len(runs):,} runs, by rank of their setting." if len(runs) > limit else ""
    )
    return Table(heads=heads, rows=rows, note=note)
