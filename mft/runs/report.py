"""The report of a comparison: one HTML file with its pictures inside, no scripts, no network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from mft import run_folder
from mft.runs.differences import differing
from mft.runs.direction import LOSSES
from mft.runs.folders import read_run
from mft.runs.ranking import SEED, Group, columns, prepare, verdicts
from mft.training.panels import MOST, color_of, label_axes, most, panel_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CURVES = 12
"""Settings drawn in a picture of curves, the best first; the table has all."""

MOST_ROWS = 100
"""Settings in a picture with a line for each, the best first."""

HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<link rel="icon" href="data:,">
<style>
body{{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em;color:#222}}
table{{border-collapse:collapse;margin:1em 0;font-size:13px;display:block;overflow-x:auto}}
td,th{{border:1px solid #ccc;padding:3px 8px;text-align:left;white-space:nowrap}} th{{background:#f3f3f3}}
img{{max-width:100%}} code{{background:#f3f3f3;padding:1px 4px;white-space:pre-wrap}} h2{{margin-top:2em}}
.say{{background:#fff7e0;border-left:4px solid #e69f00;padding:.6em 1em}}
</style></head><body>
"""


def write(groups: Sequence[Group], metric: str, path: Path, title: str) -> Path:
    """Writes the report; returns its file."""
    runs = [run for group in groups for run in group.runs]
    every = list(dict.fromkeys(task for run in runs for task in run.tasks))
    means = {task: [group.mean(task) for group in groups if group.numbers(task)] for task in every}
    worst = {task: max(of_groups) for task, of_groups in means.items() if of_groups}
    tasks = most(every, worst, MOST - 2)  # the mean and the worst task have panels, too
    head, rows = columns(groups, metric)
    compared = _compared(groups, metric)
    parts = [
        HEAD.format(title=escape(f"mft compare: {title}")),
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(runs)} runs, {len(groups)} settings, ranked by <b>{escape(metric)}</b>: each run's "
        f"{compared}, mean over n seeds. Losses are nats per token.</p>",
        f"<p class=say>{escape(verdicts(groups)[1])}</p>",
        _table(head, rows),
        "<h2>Settings and seeds</h2>" + _image(_dots(groups, metric), "every seed, mean and spread"),
        "<h2>Validation loss of every task</h2>" + _note(groups, tasks, every),
        _image(_curves(groups, tasks), "learning curves"),
    ]
    if maps := _heat(groups, ["mean", "worst", *tasks]):
        parts.append("<h2>Heat maps</h2>" + _image(maps, "heat maps"))
    if weights := _weights(groups, tasks):
        parts.append("<h2>Weights of the tasks over time</h2>" + _image(weights, "task weights"))
    parts.append("<h2>Time and memory</h2>" + _image(_cost(groups), "seconds and memory of a run"))
    keys = differing(runs)
    differences = [[run.name, run.state, *(run.values.get(key, "-") for key in keys)] for run in runs]
    parts.append("<h2>What differs between the runs</h2>" + _table(["run", "state", *keys], differences))
    cells = [f"<td>{escape(run.name)}</td><td><code>{escape(run.command)}</code></td>" for run in runs]
    commands = "".join(f"<tr>{of_run}</tr>" for of_run in cells)
    parts.append(f"<h2>To reproduce a run</h2><table>{commands}</table></body></html>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def leave_report(folder: Path) -> Path | None:
    """Writes `report.html` of the runs in a sweep's folder; None where none has a result."""
    runs = [read_run(path) for path in run_folder.runs_under(folder)]
    runs = [run for run in runs if run.best("mean") is not None]
    if not runs:
        return None
    return write(prepare(runs, "mean", ()), "mean", folder / "report.html", str(folder.name))


def _compared(groups: Sequence[Group], metric: str) -> str:
    """Returns which value of a run is compared, in words."""
    best = "highest" if any(group.higher for group in groups) else "lowest"
    losses = {*LOSSES, *(task for group in groups for run in group.runs for task in run.tasks)}
    return f"{best} {metric} validation loss" if metric in losses else f"{best} {metric}"


def _note(groups: Sequence[Group], tasks: Sequence[str], every: Sequence[str]) -> str:
    best = f"<p>The best {MOST_CURVES} of {len(groups)} settings.</p>" if len(groups) > MOST_CURVES else ""
    worst = f"<p>The {len(tasks)} tasks with the highest loss of {len(every)}; the table has all.</p>"
    return best + (worst if len(tasks) < len(every) else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{body}</table>"


def _image(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    # Inside the page: a report is one file that can be mailed or uploaded to MLflow.
    figure.savefig(buffer, dpi=90, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _dots(groups: Sequence[Group], metric: str) -> Figure:
    from matplotlib.figure import Figure

    groups = groups[:MOST_ROWS]
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(groups)), layout="constrained")
    axis = figure.add_subplot()
    for place, group in enumerate(groups):
        values = group.numbers()
        axis.plot(values, [place] * len(values), "o", color="#0072B2", alpha=0.5, markersize=6)
        if values:
            spread = group.spread() or 0.0
            axis.errorbar(group.mean(), place, xerr=spread, fmt="|", color="#000000", capsize=4)
    labels = [f"{group.label}  (n = {len(group.numbers())})" for group in groups]
    axis.set_yticks(range(len(groups)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"{_compared(groups, metric)}; dots: seeds, bar: mean ± standard deviation", fontsize=8)
    axis.grid(alpha=0.25, axis="x")
    return figure


def _by_step(group: Group, metric: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Returns steps, means, lowest and highest over the seeds of a group."""
    points: dict[int, list[float]] = {}
    for run in group.runs:
        for step, value in run.series(metric):
            points.setdefault(step, []).append(value)
    steps = sorted(points)
    values = [points[step] for step in steps]
    return steps, [fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _curves(groups: Sequence[Group], tasks: Sequence[str]) -> Figure:
    shown = groups[:MOST_CURVES]
    panels = ["mean", *tasks]
    figure, axes = panel_grid(len(panels), "mean over seeds, band: lowest to highest seed")
    labels = [group.label for group in shown]
    for axis, metric in zip(axes, panels, strict=True):
        axis.set_title(metric, fontsize=10)
        for group in shown:
            steps, means, low, high = _by_step(group, metric)
            color = color_of(group.label, labels)
            axis.plot(steps, means, color=color, marker="o", markersize=2.5, linewidth=1.3, label=group.label)
            axis.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    return _labelled(figure, axes, "loss (nats/token)")


def _weights(groups: Sequence[Group], tasks: Sequence[str]) -> Figure | None:
    weighted = [g for g in groups if any(_by_step(g, f"train/weight/{task}")[0] for task in tasks)]
    if not weighted:
        return None
    shown = weighted[:MOST_CURVES]
    figure, axes = panel_grid(len(shown), "mean over seeds")
    for axis, group in zip(axes, shown, strict=True):
        axis.set_title(group.label, fontsize=8)
        for task in tasks:
            steps, means, _, _ = _by_step(group, f"train/weight/{task}")
            axis.plot(steps, means, color=color_of(task, tasks), marker="o", markersize=2.5, label=task)
        axis.set_ylim(bottom=0)
    return _labelled(figure, axes, "weight")


def _labelled(figure: Figure, axes: Sequence[Axes], unit: str) -> Figure:
    """Returns a figure of curves with its axes named and one legend for all of them."""
    label_axes(axes, unit)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _heat(groups: Sequence[Group], metrics: Sequence[str]) -> Figure | None:
    """The grid of loss mode and learning rate, or of the first two keys that differ; None below two."""
    keys = [key for key in (groups[0].keys if groups else {}) if key != SEED]
    # Of any other keys, the first two of the table: the sort is stable.
    keys.sort(key=lambda key: {"loss": 0, "optimizer.lr": 1}.get(key, 2))
    if len(keys) < 2:
        return None
    rows = sorted({g.keys[keys[0]] for g in groups}, key=_order)
    cols = sorted({g.keys[keys[1]] for g in groups}, key=_order)
    title, size = f"{keys[0]} × {keys[1]}: mean of all their runs", (4.2, 1.4 + 0.4 * len(rows))
    figure, axes = panel_grid(len(metrics), title, size)
    for axis, metric in zip(axes, metrics, strict=True):
        cells = [[_cell(groups, {keys[0]: row, keys[1]: col}, metric) for col in cols] for row in rows]
        axis.grid(False)
        axis.imshow(cells, cmap="viridis_r", aspect="auto")
        axis.set_title(f"{metric} task" if metric == "worst" else metric, fontsize=10)
        axis.set_xticks(range(len(cols)), cols, fontsize=8)
        place = axis.get_subplotspec()
        axis.set_yticks(range(len(rows)), rows if place is None or place.is_first_col() else [], fontsize=8)
        numbers = [value for line in cells for value in line if not math.isnan(value)]
        # darker cells than this get white text
        middle = (min(numbers) + max(numbers)) / 2 if numbers else 0.0
        for y, line in enumerate(cells):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    color = "white" if value > middle else "black"
                    axis.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=8, color=color)
    return figure


def _order(value: str) -> tuple[bool, float, str]:
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def _cell(groups: Sequence[Group], keys: dict[str, str], metric: str) -> float:
    values = [v for g in groups if keys.items() <= g.keys.items() for v in g.numbers(metric)]
    return fmean(values) if values else math.nan


def _cost(groups: Sequence[Group]) -> Figure:
    from matplotlib.figure import Figure

    groups = groups[:MOST_ROWS]
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(groups)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, attribute in ((axes[0], "seconds", "seconds"), (axes[1], "peak memory (GiB)", "memory")):
        for place, group in enumerate(groups):
            values = [value for run in group.runs if (value := getattr(run, attribute)) is not None]
            axis.barh(place, fmean(values) if values else 0.0, color="#56B4E9")
        axis.set_xlabel(name, fontsize=8)
    axes[0].set_yticks(range(len(groups)), [group.label for group in groups], fontsize=8)
    axes[0].invert_yaxis()
    return figure
