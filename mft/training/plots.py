"""Plots of a run: the losses and task weights of its metrics.jsonl, and the lengths of its samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.training.panels import MOST, Color, color_of, label_axes, most, panel_grid

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Series = tuple[list[int], list[float]]  # steps, values

MANY = 60
"""From this many points on, train losses are drawn pale with their moving mean over them."""


def loss_curves(rows: Sequence[Row], folder: Path) -> Path | None:
    """Draws `losses.png` into folder: validation losses of all tasks in one panel, then one of each task.

    Of many tasks those with the highest last loss have a panel and a name; the others are thin grey lines in
    the first one. rows: of metrics.jsonl (`{"step": 10, "train/loss/<task>": 1.2, ...}`), losses in
    nats/token. Returns the file, or None where no loss was logged.
    """
    names = _tasks(rows, "train/loss/", "valid/loss/")
    tasks = most(names, _last(rows, "train/loss/", "valid/loss/"), MOST - 2)
    panels = [(task, f"train/loss/{task}", f"valid/loss/{task}") for task in tasks]
    if len(names) != 1 and any(key in row for row in rows for key in ("train/loss", "valid/loss")):
        panels.insert(0, ("objective of all tasks" if tasks else "loss", "train/loss", "valid/loss"))
    if not panels:
        return None
    # with one validated task the first panel would only repeat the task's own
    validated = [task for task in tasks if _series(rows, f"valid/loss/{task}")[0]]
    first = 1 if len(validated) > 1 else 0
    title = "Losses"
    if len(tasks) < len(names):
        title += f"; the {len(tasks)} tasks with the highest last loss of {len(names)}"
    figure, axes = panel_grid(first + len(panels), title)
    if first:
        axes[0].set_title("validation, every task", fontsize=10)
        _lines(axes[0], rows, "valid/loss/", names, tasks)
        _legend(axes[0], len(validated))
    for axis, (name, train, valid) in zip(axes[first:], panels, strict=True):
        axis.set_title(name, fontsize=10)
        _panel(axis, _series(rows, train), _series(rows, valid), color_of(name, tasks))
    label_axes(axes, "loss (nats/token)")
    return _save(figure, folder / "losses.png")


def task_weights(rows: Sequence[Row], folder: Path) -> Path | None:
    """Draws `task_weights.png` into folder: the weights that an adaptive loss gave the tasks.

    Returns the file, or None where no weight (`train/weight/<task>`) was logged.
    """
    weighted = _tasks(rows, "train/weight/")
    if not weighted:
        return None
    tasks = _tasks(rows, "train/loss/", "valid/loss/") or weighted  # few tasks have the colours of losses.png
    if len(tasks) > MOST - 2:
        tasks = most(weighted, _last(rows, "train/weight/"))
    title = "Weights of the tasks in the loss"
    if len(tasks) < len(weighted):
        title += f"; the {len(tasks)} largest of {len(weighted)}"
    figure, axes = panel_grid(1, title, size=(7.2, 4.0))
    _lines(axes[0], rows, "train/weight/", weighted, tasks)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    label_axes(axes, "weight")
    return _save(figure, folder / "task_weights.png")


def length_histogram(lengths: Mapping[str, np.ndarray], seq_length: int, folder: Path) -> Path:
    """Draws `lengths.png` into folder: a histogram of the samples' lengths for each task, on one axis.

    Of many tasks the largest have their own panel, and the others share one.
    lengths: int array [N] of tokens a sample, by task; seq_length: drawn as a line, the longest there can be.
    """
    import numpy as np

    largest = most(list(lengths), {task: len(length_N) for task, length_N in lengths.items()}, MOST - 1)
    others = [length_N for task, length_N in lengths.items() if task not in set(largest)]
    if others:
        lengths = {task: lengths[task] for task in largest}
        lengths[f"{len(others)} other tasks"] = np.concatenate(others)
    figure, axes = panel_grid(len(lengths), "Tokens of a sample", size=(4.2, 2.4))
    longest = max((int(length_N.max()) for length_N in lengths.values() if len(length_N)), default=1)
    edges = np.linspace(0, max(longest, 1), 41)
    for axis, (task, length_N) in zip(axes, lengths.items(), strict=True):
        axis.stairs(np.histogram(length_N, edges)[0], edges, fill=True, color=color_of(task, list(lengths)))
        axis.set_title(f"{task}: {len(length_N):,} samples", fontsize=10)
        if len(length_N):
            p50, p95 = (float(p) for p in np.percentile(length_N, [50, 95]))
            for value, name, style in ((p50, "p50", "--"), (p95, "p95", ":")):
                label = f"{name} {value:,.0f}"
                axis.axvline(value, color="#444444", linestyle=style, linewidth=1.2, label=label)
        if seq_length <= longest * 1.05:
            axis.axvline(seq_length, color="#000000", linewidth=1, label=f"data.seq_length {seq_length:,}")
        _legend(axis, 3)
        axis.set_xlim(0, longest * 1.05)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("samples", fontsize=8)
    return _save(figure, folder / "lengths.png")


def _tasks(rows: Iterable[Row], *prefixes: str) -> list[str]:
    """Returns the tasks that have metrics under these prefixes, in the order in which they appear."""
    tasks: dict[str, None] = {}  # an ordered set
    for row in rows:
        for key in row:
            tasks |= {key.removeprefix(prefix): None for prefix in prefixes if key.startswith(prefix)}
    return list(tasks)


def _series(rows: Iterable[Row], key: str) -> Series:
    """Returns steps and values; null, as non-finite values are written, becomes a gap."""
    points = sorted((int(row["step"]), row[key]) for row in rows if key in row and "step" in row)
    return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]


def _last(rows: Iterable[Row], *prefixes: str) -> dict[str, float]:
    """Returns the last finite value of every task; that of a later prefix counts more."""
    last = {}
    for prefix in prefixes:
        for row in rows:
            for key, value in row.items():
                if key.startswith(prefix) and value is not None and math.isfinite(value):
                    last[key.removeprefix(prefix)] = float(value)
    return last


def _lines(axis: Axes, rows: Sequence[Row], prefix: str, names: Sequence[str], named: Sequence[str]) -> None:
    """Draws a line for each task that has values; those not in `named` are thin and grey."""
    from matplotlib.collections import LineCollection

    others = []
    for name in names:
        steps, values = _series(rows, prefix + name)
        if steps and name in named:
            marker = "o" if len(steps) < MANY else None
            axis.plot(steps, values, marker=marker, markersize=3, color=color_of(name, named), label=name)
        elif steps:
            others.append(list(zip(steps, values, strict=True)))
    if others:
        # one collection: hundreds of plot calls would take seconds
        grey: Any = {"colors": "#999999", "linewidths": 0.5, "alpha": 0.4, "label": "other tasks"}
        axis.add_collection(LineCollection(others, zorder=1, **grey))
        axis.autoscale_view()


def _panel(axis: Axes, train: Series, valid: Series, color: Color) -> None:
    """One task: train pale, with its moving mean where there are many points; valid in full colour."""
    steps, values = train
    if steps:
        many = len(steps) >= MANY
        style: dict[str, Any] = {} if many else {"marker": ".", "markersize": 5}
        label = None if many else "train"
        axis.plot(steps, values, color=color, alpha=0.25 if many else 0.45, linewidth=1, label=label, **style)
        if many:
            label = "train, moving mean"
            axis.plot(steps, _smooth(values), color=color, alpha=0.6, linewidth=1.4, label=label)
    steps, values = valid
    if steps:
        axis.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1.8, label="valid")
        if math.isfinite(values[-1]):
            axis.annotate(
                f"{values[-1]:.3f}",
                (steps[-1], values[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
            )
    _legend(axis, 2)


def _smooth(values: Sequence[float]) -> list[float]:
    """Returns the exponential moving mean over about a twentieth of the points, without a bias at first."""
    # both sums start at 0 and decay alike, so that their ratio has no bias towards 0 (as in Adam)
    keep = 1 - 1 / max(5, len(values) / 20)
    total = weight = 0.0
    smooth = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight if weight else math.nan)
    return smooth


def _legend(axis: Axes, entries: int) -> None:
    if axis.get_legend_handles_labels()[0]:
        fontsize, columns = (8, 1) if entries <= 8 else (6, 2)
        axis.legend(fontsize=fontsize, frameon=False, loc="upper right", ncols=columns)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
