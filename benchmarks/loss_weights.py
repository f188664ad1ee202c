"""Draws the task weights of a sweep's adaptive modes over time, a panel a mode: the picture in
docs/losses.md.

    python -m benchmarks.loss_weights multirun/loss_study/<sweep> docs/losses_weights.png [override ...]

Of each mode the first run is drawn whose settings hold every override, e.g. optimizer.lr=0.004 train.seed=1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mft.training.panels import color_of, label_axes, panel_grid


def weights(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Returns steps and weights of each task, empty for modes whose weights do not move."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name in row:
            if (
                name.startswith("train/weight/") and row[name]
            ):  # 0: famo, and the task is absent from the step
                steps, values = found.setdefault(name.removeprefix("train/weight/"), ([], []))
                steps.append(row["step"])
                values.append(row[name])
    return found


def main(sweep: Path, picture: Path, overrides: list[str]) -> None:
    """Writes the picture."""
    modes: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for path in sorted(sweep.glob("*/overrides.json")):
        given = json.loads(path.read_text(encoding="utf-8"))["overrides"]
        mode = next((value.removeprefix("loss=") for value in given if value.startswith("loss=")), "")
        if mode and mode not in modes and set(overrides) <= set(given) and (moved := weights(path.parent)):
            modes[mode] = moved
    figure, axes = panel_grid(len(modes), "Weights of the tasks in the loss", size=(3.0, 2.2))
    for axis, (mode, tasks) in zip(axes, sorted(modes.items()), strict=True):
        axis.set_title(mode, fontsize=10)
        for task, (steps, values) in tasks.items():
            axis.plot(steps, values, color=color_of(task, list(tasks)), label=task)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=7, frameon=False)
    label_axes(axes, "weight")
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
