"""Runs made up in code, with the record that real ones leave."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mft.runs.results import Run

TASKS = ("docs", "code", "math")


def made_run(
    values: Mapping[str, str], losses: Mapping[str, float], seed: int = 1, steps: int = 40, **fields: Any
) -> Run:
    """Returns a finished run whose validation losses fall from 3 to those given, nats per token."""
    noise = random.Random(f"{sorted(values.items())} {seed}")
    every = max(1, steps // 5)
    rows = []
    for step in range(0, steps + 1, every):
        left = math.exp(-5 * step / steps) if steps else 0.0
        row: dict[str, Any] = {"step": step}
        row |= {f"valid/loss/{task}": loss + (3 - loss) * left for task, loss in losses.items()}
        if step:
            row |= {f"train/weight/{task}": 1 + noise.uniform(-0.2, 0.2) for task in losses}
        rows.append(row)
    given = {"task": f"[{','.join(losses)}]", "model": "tiny", "train.seed": str(seed), **values}
    words = " ".join(f"{key}={value}" for key, value in given.items())
    known = {
        "name": " · ".join([*values.values(), f"s{seed}"]),
        "state": "finished",
        "seconds": 100 * noise.uniform(0.9, 1.1),
        "memory": 2.0,
        "tokens": 1e6,
        "flops": 1e15,
        "command": f"mft train {words}",
        "where": f"multirun/made/{words}",
        "test": {task: loss + 0.02 for task, loss in losses.items()},
        "test_step": steps,
        "facts": {
            "host": "here",
            "commit": "0123456789ab",
            "data": {task: {"train": 900, "valid": 100, "test": 100} for task in losses},
        },
    }
    return Run(values=given, rows=rows, **(known | fields))


def grid(
    modes: Sequence[str] = ("mean", "coba"),
    rates: Sequence[str] = ("0.001", "0.0002"),
    seeds: Sequence[int] = (1, 2, 3),
    tasks: Sequence[str] = TASKS,
) -> list[Run]:
    """Returns runs of two keys and several seeds: the first of each key is better, on the last task worse."""
    noise, runs = random.Random(0), []
    for mode in modes:
        for rate in rates:
            for seed in seeds:
                worse = 0.05 * (mode != modes[0]) + 0.1 * (rate != rates[0]) + 0.01 * seed
                losses = {
                    task: 1
                    + 0.2 * place
                    + worse * (-1 if place == len(tasks) - 1 else 1)
                    + noise.gauss(0, 0.003)
                    for place, task in enumerate(tasks)
                }
                runs.append(made_run({"loss": mode, "optimizer.lr": rate}, losses, seed))
    return runs


def search(count: int) -> list[Run]:
    """Returns so many runs on random values of two continuous keys, one seed each."""
    noise, runs = random.Random(1), []
    for _ in range(count):
        rate, decay = 10 ** noise.uniform(-5, -2), noise.uniform(0, 0.3)
        bowl = 0.1 * (math.log10(rate) + 3.5) ** 2 + 0.1 * decay
        values = {"optimizer.lr": f"{rate:g}", "optimizer.weight_decay": f"{decay:.4g}"}
        losses = {task: 1 + 0.2 * i + bowl + noise.gauss(0, 0.01) for i, task in enumerate(TASKS)}
        runs.append(made_run(values, losses))
    return runs
