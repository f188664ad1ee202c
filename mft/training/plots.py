"""Pictures of a run: what its metrics.jsonl says, and how long its samples are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft import run_folder
from mft.training.panels import MOST, color_of, label_axes, most, panel_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Series = tuple[list[int], list[float]]  # steps, values

MANY = 60  # from this many points on, train losses are drawn pale with their moving mean over them


def loss_curves(metrics: Sequence[Row] | Path, folder: Path, title: str = "") -> Path | None:
    """Draws `losses.png` into folder: validation losses of all tasks together, then train and valid in a
    panel a task.

    Of many tasks the ones with the highest last loss have a panel and a name; the others are thin grey lines
    in the first one. metrics: rows of metrics.jsonl (`{"step": 10, "train/loss/<task>": 1.2, ...}`), or that
    file. Losses in nats/token. Returns the file, or None where no loss was logged.
    """
    rows = _rows(metrics)
    every = _names(rows, ("train/loss/", "valid/loss/"))
    tasks = most(every, _last(rows, "train/loss/") | _last(rows, "valid/loss/"), MOST - 2)
    panels = [(task, f"train/loss/{task}", f"valid/loss/{task}") for task in tasks]
    if len(every) != 1 and any(key in row for row in rows for key in ("train/loss", "valid/loss")):
        panels.insert(0, ("objective of all tasks" if tasks else "loss", "train/loss", "valid/loss"))
    if not panels:
        return None
    together = [task for task in tasks if _series(rows, f"valid/loss/{task}")[0]]
    first = 1 if len(together) > 1 else 0
    some = (
        f"; the {len(tasks)} tasks with the highest last loss of {len(every)}"
        if len(tasks) < len(every)
        else ""
    )
    figure, axes = panel_grid(first + len(panels), (title or "Losses") + some)
    if first:
        axes[0].set_title("validation, every task", fontsize=10)
        _others(axes[0], rows, "valid/loss/", every, tasks)
        for task in together:
            steps, values = _series(rows, f"valid/loss/{task}")
            axes[0].plot(steps, values, marker="o", markersize=3, color=color_of(task, tasks), label=task)
        _legend(axes[0], len(together))
    for axis, (name, train, valid) in zip(axes[first:], panels, strict=True):
        axis.set_title(name, fontsize=10)
        _panel(axis, _series(rows, train), _series(rows, valid), color_of(name, tasks))
    label_axes(axes, "loss (nats/token)")
    return _save(figure, folder / "losses.png")


def task_weights(metrics: Sequence[Row] | Path, folder: Path, title: str = "") -> Path | None:
    """Draws `task_weights.png` into folder: the weights an adaptive loss mode gave the tasks
    (`train/weight/<task>`).

    Returns the file, or None where no weights were logged.
    """
    rows = _rows(metrics)
    weighted = _names(rows, ("train/weight/",))
    if not weighted:
        return None
    every = _names(rows, ("train/loss/", "valid/loss/")) or weighted
    losses = _last(rows, "train/loss/") | _last(rows, "valid/loss/")
    tasks = (
        most(every, losses, MOST - 2)
        if len(every) <= MOST - 2
        else most(weighted, _last(rows, "train/weight/"))
    )
    named = [task for task in weighted if task in set(tasks)]  # few tasks have the colours of losses.png
    some = f"; the {len(named)} largest of {len(weighted)}" if len(named) < len(weighted) else ""
    figure, axes = panel_grid(1, (title or "Weights of the tasks in the loss") + some, size=(7.2, 4.0))
    _others(axes[0], rows, "train/weight/", weighted, named)
    for task in named:
        steps, values = _series(rows, f"train/weight/{task}")
        marker = "o" if len(steps) < MANY else None
        axes[0].plot(steps, values, marker=marker, markersize=3, color=color_of(task, tasks), label=task)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    label_axes(axes, "weight")
    return _save(figure, folder / "task_weights.png")


def length_histogram(lengths: Mapping[str, Any], seq_length: int, folder: Path) -> Path:
    """Draws `lengths.png` into folder: a histogram of the samples' lengths for each task, on one axis.

    Of many tasks the largest have a panel of their own, and the others one together.
    lengths: int array [N] of tokens a sample, by task; seq_length: drawn as a line, the longest there can be.
    """
    import numpy as np

    shown = most(list(lengths), {task: len(length_N) for task, length_N in lengths.items()}, MOST - 1)
    others = [length_N for task, length_N in lengths.items() if task not in set(shown)]
    if others:
        lengths = {task: lengths[task] for task in shown} | {
            f"{len(others)} other tasks": np.concatenate(others)
        }
    figure, axes = panel_grid(len(lengths), "Tokens of a sample", size=(4.2, 2.4))
    longest = max((int(length_N.max()) for length_N in lengths.values() if len(length_N)), default=1)
    edges = np.linspace(0, max(longest, 1), 41)
    for axis, (task, length_N) in zip(axes, lengths.items(), strict=True):
        axis.stairs(np.histogram(length_N, edges)[0], edges, fill=True, color=color_of(task, list(lengths)))
        axis.set_title(f"{task}: {len(length_N):,} samples", fontsize=10)
        if len(length_N):
            p50, p95 = (float(p) for p in np.percentile(length_N, [50, 95]))
            for value, name, style in ((p50, "p50", "--"), (p95, "p95", ":")):
                axis.axvline(
                    value, color="#444444", linestyle=style, linewidth=1.2, label=f"{name} {value:,.0f}"
                )
        if seq_length <= longest * 1.05:
            axis.axvline(seq_length, color="#000000", linewidth=1, label=f"data.seq_length {seq_length:,}")
        _legend(axis, 3)
        axis.set_xlim(0, longest * 1.05)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("samples", fontsize=8)
    return _save(figure, folder / "lengths.png")


def _rows(metrics: Sequence[Row] | Path) -> Sequence[Row]:
    if not isinstance(metrics, str | Path):
        return list(metrics)
    return run_folder.metric_rows(Path(metrics))[0]


def _names(rows: Iterable[Row], prefixes: Sequence[str]) -> list[str]:
    """Returns the tasks of these metrics in the order in which they appear."""
    found: dict[str, None] = {}
    for row in rows:
        for key in row:
            for prefix in prefixes:
                if key.startswith(prefix):
                    found[key.removeprefix(prefix)] = None
    return list(found)


def _series(rows: Iterable[Row], key: str) -> Series:
    """Returns steps and values; null, as non-finite values are written, becomes a gap."""
    points = sorted((int(row["step"]), row[key]) for row in rows if key in row and "step" in row)
    return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]


def _last(rows: Iterable[Row], prefix: str) -> dict[str, float]:
    """Returns the last finite value of every task under a prefix."""
    return {
        key.removeprefix(prefix): float(value)
        for row in rows
        for key, value in row.items()
        if key.startswith(prefix) and value is not None and math.isfinite(value)
    }


def _others(axis: Axes, rows: Sequence[Row], prefix: str, every: Sequence[str], named: Sequence[str]) -> None:
    """Draws the tasks without a name of their own, all in one go: a line each, thin and grey."""
    from matplotlib.collections import LineCollection

    rest = set(every) - set(named)
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items() if "step" in row else ():
            if key.startswith(prefix) and key.removeprefix(prefix) in rest and value is not None:
                points.setdefault(key, []).append((int(row["step"]), float(value)))
    if points:
        lines = LineCollection(
            list(points.values()), colors="#999999", linewidths=0.5, alpha=0.4, label="other tasks"
        )
        axis.add_collection(lines)
        axis.autoscale_view()


def _panel(axis: Axes, train: Series, valid: Series, color: Any) -> None:
    """One task: train pale, with its moving mean where there are many points; valid in full colour."""
    steps, values = train
    if steps:
        many = len(steps) >= MANY
        style: dict[str, Any] = {} if many else {"marker": ".", "markersize": 5}
        label = None if many else "train"
        axis.plot(steps, values, color=color, alpha=0.25 if many else 0.45, linewidth=1, label=label, **style)
        if many:
            axis.plot(
                steps, _smooth(values), color=color, alpha=0.6, linewidth=1.4, label="train, moving mean"
            )
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
    """Returns the exponential moving mean over about a twentieth of the points, exact from the first one
    on."""
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
        axis.legend(
            fontsize=8 if entries <= 8 else 6,
            frameon=False,
            loc="upper right",
            ncols=1 if entries <= 8 else 2,
        )


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
