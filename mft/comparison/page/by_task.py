"""The differences by task in colours, from the reference: who pays for a better mean."""

from __future__ import annotations

import math

from mft.comparison.compare import Comparison
from mft.comparison.multitask import losses_of
from mft.comparison.page.differences import name_of
from mft.comparison.page.ranked import measured, table_tasks
from mft.comparison.page.table import Cell, Head, Table
from mft.comparison.statistics import Difference
from mft.comparison.verdicts import decimals, p_text, signed

MOST_LINES = 100
"""Settings in the table, the best first."""

SHADES = 5
"""Of a colour, from pale to strong."""


def by_task(comparison: Comparison) -> Table | None:
    """Returns the differences from the reference on each task, coloured; None where there is nothing to see.

    Shades are of the difference in per cent of the reference's loss, on one scale for all cells.
    """
    reference, tasks = comparison.reference, table_tasks(comparison)
    if reference is None or not tasks or len(comparison.settings) < 2:
        return None
    losses = losses_of(reference, tasks)
    shown = [
        (setting, found)
        for setting, found in zip(comparison.settings, comparison.by_task, strict=True)
        if setting is not reference and found
    ]
    if not shown:
        return None
    table = Table(heads=[Head("setting", "", False), *(Head(task) for task in tasks)])
    table.fixed = [[Cell(f"{name_of(reference)} (loss)"), *(measured(losses.get(task)) for task in tasks)]]
    relative = [
        abs(d.estimate) / losses[task] for _, found in shown for task, d in found.items() if losses.get(task)
    ]
    # One wild setting must not leave all others pale.
    largest = sorted(relative)[int(0.95 * (len(relative) - 1))] if relative else 0.0
    for setting, found in shown[:MOST_LINES]:
        row = [Cell(name_of(setting), None, "", setting.title)]
        row += [_coloured(found.get(task), losses.get(task), largest) for task in tasks]
        table.rows.append(row)
    if len(shown) > MOST_LINES:
        table.note = f"The best {MOST_LINES} of {len(shown):,} settings."
    return table


def _coloured(difference: Difference | None, loss: float | None, largest: float) -> Cell:
    if difference is None:
        return Cell("")
    share = difference.estimate / loss if loss else 0.0
    shade = max(1, min(SHADES, math.ceil(SHADES * abs(share) / largest))) if largest and share else 0
    way = "b" if share < 0 else "w"
    css = "" if not shade else f"{way}{shade} sure" if difference.told_apart else f"{way}0 open"
    hint = f"{100 * share:+.2f} %; {signed(difference)}"
    p = p_text(difference.adjusted_p)
    hint += f"; p = {p} after Holm's correction over tasks" if p else ""
    return Cell(f"{difference.estimate:+.{decimals(difference)}f}", difference.estimate, css, hint)
