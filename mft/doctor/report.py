"""The findings as a person reads them, a line each as they come, and as JSON for a bug report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from mft.console.screen import console
from mft.doctor.finding import Finding, State

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
"""Of the JSON; raised where a key changes its meaning."""

STYLES = {State.ok: "green", State.note: "yellow", State.problem: "bold red"}
WIDTHS = (8, 18)
"""Columns of the state and of the name; the rest of the line says what was found."""


def show(findings: Iterable[Finding]) -> list[Finding]:
    """Prints each finding as it comes, under the name of its part; returns all of them."""
    screen, seen, part = console(), [], ""
    for finding in findings:
        if finding.part != part:
            part = finding.part
            screen.print(part, style="bold")
        screen.print(line(finding))
        seen.append(finding)
    return seen


def line(finding: Finding) -> Table:
    """Returns a finding as a row in three columns, what it says folded in the last; the cure below it."""
    from rich.table import Table
    from rich.text import Text

    # A Text has no markup: what a library or a file says is shown as it is.
    row = Table.grid(padding=(0, 1))
    for width in WIDTHS:
        row.add_column(width=width, overflow="fold")
    row.add_column(overflow="fold")
    row.add_row(Text(finding.state, style=STYLES[finding.state]), Text(finding.name), Text(finding.found))
    if finding.cure and finding.state is not State.ok:
        row.add_row("", "", Text(f"→ {finding.cure}", style="dim"))
    return row


def as_json(findings: Sequence[Finding]) -> str:
    """Returns the findings as JSON: format, problems (their number) and findings."""
    problems = sum(finding.state is State.problem for finding in findings)
    return json.dumps(
        {"format": FORMAT, "problems": problems, "findings": [asdict(finding) for finding in findings]},
        indent=2,
        ensure_ascii=False,
    )
