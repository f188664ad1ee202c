"""What a user sees while a run trains: a rich progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mft.console.screen import console
from mft.console.tables import pasted, table
from mft.objective import mean_of_tasks

if TYPE_CHECKING:
    from rich.table import Table

NAMED = 12
"""Tasks that a line names; of more it names those with the highest loss."""


class Terminal:
    """Step, loss, loss of every task, tokens/s and time left; a live bar only on a terminal."""

    def __init__(self, names: Sequence[str], quiet: bool = False):
        """quiet: shows nothing, as on the ranks other than 0."""
        from rich import progress as rich

        self.names, self.total = list(names), 0
        self.console = console(file=sys.stdout, quiet=quiet)
        self.bar = rich.Progress(
            rich.TextColumn("[bold]{task.description}"),
            rich.BarColumn(bar_width=24),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[numbers]}"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=None, numbers="")

    def show(self, renderable: object) -> None:
        self.console.print(renderable, markup=False)

    def show_pasted(self, rows: Iterable[tuple[str, object]], title: str) -> None:
        """Shows names and values, those that a person copies among them, see `tables.pasted`."""
        self.console.print(pasted(rows, title), soft_wrap=True)

    def start(self, done: int, total: int) -> None:
        self.total = total
        self.bar.update(self.task, completed=done, total=total)
        self.bar.start()

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        numbers = f"loss {values['train/loss']:.3f} · {values['speed/tokens_per_second']:,.0f} tokens/s"
        self.bar.update(self.task, numbers=numbers)
        self._line(step, numbers, values, "train/loss/")  # kept in the log, unlike the bar

    @contextmanager
    def evaluating(self, split: str) -> Iterator[None]:
        self.bar.update(self.task, description={"valid": "validating", "test": "testing"}[split])
        yield
        self.bar.update(self.task, description="training")

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        self._line(step, f"valid {sum(losses.values()) / len(losses):.3f}", losses, "", "bold")

    def _line(self, step: int, text: str, losses: Mapping[str, float], prefix: str, style: str = "") -> None:
        from rich.text import Text

        by_task = [(name, losses[prefix + name]) for name in self.names if prefix + name in losses]
        others = len(by_task) - NAMED
        if others > 1:  # one more has room
            by_task = sorted(by_task, key=lambda item: item[1], reverse=True)[:NAMED]
        listed = " · ".join(f"{name} {loss:.3f}" for name, loss in by_task)
        listed = f"highest: {listed} · {others} more tasks" if others > 1 else listed
        at = f"step {step:>{len(str(self.total))}}/{self.total}  "
        self.console.print(Text.assemble(at, (text, style), "  ", (listed, "dim")))

    def close(self) -> None:
        self.bar.stop()


def losses_table(
    first: Mapping[str, float],
    last: Mapping[str, float],
    best: Mapping[str, float],
    best_step: int,
    test: Mapping[str, float] | None = None,
    test_step: int | None = None,
) -> Table:
    """Returns the table at the end of a run: each task's first, last and best validation loss and its test
    loss (nats/token)."""

    def row(name: str, a: float, b: float, c: float, d: float) -> list[str]:
        return [name, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}", f"{c:.3f}", f"{d:.3f}"][: 1 + len(numbers)]

    numbers = ["first", "last", "change", f"at best step {best_step}"]
    numbers += [f"test at step {test_step}"] if test else []
    title = "Validation and test loss" if test else "Validation loss"
    columns, names = (first, last, best, test or {}), dict.fromkeys([*last, *(test or {})])
    rows = [row(name, *(losses.get(name, math.nan) for losses in columns)) for name in names]
    mean = row("mean", *map(mean_of_tasks, columns)) if len(names) > 1 else None
    title = f"{title} per task (nats per token)"
    return table(title, ["task", *numbers], rows, numbers, total=mean)
