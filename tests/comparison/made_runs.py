"""Runs made of numbers, for tests of what is said about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mft.runs.results import Run


def run(
    losses: dict[str, float], seed: int = 1, folder: Path | None = None, start: float = 4.0, **values: str
) -> Run:
    """Returns a run that starts at `start` on every task and reaches the losses at step 20 of 30."""
    rows = [
        {"step": step}
        | {f"valid/loss/{task}": loss + more if step else start for task, loss in losses.items()}
        for step, more in ((0, 0.0), (10, 0.2), (20, 0.0), (30, 0.1))
    ]
    named = {"train.seed": str(seed), "data.paths": "[]"} | {
        key.replace("__", "."): v for key, v in values.items()
    }
    return Run(f"{'-'.join(values.values())}-{seed}", named, rows, "finished", seconds=10.0, folder=folder)


def write_rows(
    folder: Path, step: int, **tasks: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> dict[str, float]:
    """Writes the row losses of a validation as a run does; returns the loss of every task.

    tasks: keys, trained tokens and loss sums of the rows of each.
    """
    columns = [(task, *of) for task, of in tasks.items()]
    table = pa.table(
        {
            "task": pa.array([task for task, row, _, _ in columns for _ in row]).dictionary_encode(),
            "row": np.concatenate([row for _, row, _, _ in columns]).astype(np.uint64),
            "tokens": np.concatenate([tokens for _, _, tokens, _ in columns]).astype(np.int32),
            "loss": np.concatenate([loss for _, _, _, loss in columns]).astype(np.float32),
        }
    )
    (folder / "sample_losses").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "sample_losses" / f"valid-{step}.parquet", compression="zstd")
    return {task: float(loss.sum() / tokens.sum()) for task, _, tokens, loss in columns}
