"""The loss on test rows, which nothing was chosen by, beside that on validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from mft.comparison.compare import Comparison
from mft.comparison.page.differences import MOST_LINES, WIDE, height, name_lines, name_of
from mft.comparison.page.svg import BAD, GOOD, GREY, Canvas, Entry, Section, hint
from mft.comparison.settings import Metric, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tested(comparison: Comparison, canvas: Canvas) -> Section | None:
    """Draws the loss on test rows beside that on validation rows, for settings that have both."""
    tasks = test_tasks(comparison)
    lines = [
        (setting, *losses)
        for setting in comparison.ranked
        if (losses := losses_beside(setting, tasks)) is not None
    ]
    if len(lines) < 2:
        return None
    shown = lines[:MOST_LINES]

    def draw(axis: Axes) -> None:
        for place, (setting, valid, test) in enumerate(shown):
            axis.plot([valid, test], [place, place], color=GREY, linewidth=1.2)
            axis.plot([valid], [place], "o", color=GOOD, markersize=5.5)
            (dot,) = axis.plot([test], [place], "o", color=BAD, markersize=5.5)
            dot.set_gid(hint(f"{setting.title}: validation {valid:.4f}, test {test:.4f}"))
        name_lines(axis, [name_of(setting) for setting, _, _ in shown])
        axis.set_xlabel("mean loss over tasks (nats/token)")

    text = [
        f"The best {len(shown)} of {len(lines):,} settings with test rows."
        if len(shown) < len(lines)
        else "",
        "The test rows were looked at once, at each run's best checkpoint, and never used to choose.",
    ]
    label = "mean loss on test rows beside that on validation rows, by setting"
    picture = canvas.picture(label, draw, (WIDE, height(len(shown))))
    legend = [Entry("validation", GOOD, shape="disc"), Entry("test", BAD, shape="disc")]
    return Section("Test beside validation", text, [picture], legend)


def test_tasks(comparison: Comparison) -> list[str]:
    """Returns the common tasks that every run with test rows has test rows of."""
    tested = [run.test for run in comparison.runs if run.test]
    return [task for task in comparison.tasks if tested and all(task in of_run for of_run in tested)]


def losses_beside(setting: Setting, tasks: Sequence[str]) -> tuple[float, float] | None:
    """Returns the mean validation and test loss over tasks; None where one of them is not known.

    Both are of the runs that have both: a run that goes on has no test yet.
    """
    valid, test = [], []
    for task in tasks:
        runs = [(one.value(Metric(task)), one.run.test.get(task)) for one in setting.judged]
        known = [(mine, other) for mine, other in runs if mine is not None and other is not None]
        if not known:
            return None
        valid.append(fmean(mine for mine, _ in known))
        test.append(fmean(other for _, other in known))
    return (fmean(valid), fmean(test)) if tasks else None
