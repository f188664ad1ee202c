"""Small real trainings for tests: two tasks of a few rows, a tiny model, in this process or in workers."""

from __future__ import annotations

import gc
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import mft.run
from mft.config.compose import compose_resolved
from mft.launch import job
from mft.launch.launch import launch
from mft.run_folder import RunStatus
from mft.training import plots
from mft.training.metrics import CLOCKED
from mft.training.trainer import Trainer

SAVING = (
    "peft=lora",
    "peft.dropout=0.1",
    "optimizer.lr=1e-2",
    "train.max_steps=6",
    "train.save_every=2",
    "train.eval_every=2",
)
"""Six steps with dropout, each second one validated and saved."""


def write_task(folder: Path, rows: int, seed: int = 0, longest: int = 20) -> Path:
    """Writes a task of chatML rows with answers of 1 to `longest` words; a function of the arguments."""
    draw = random.Random(f"{folder.name} {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            answer = " ".join(str(draw.randint(0, 99)) for _ in range(draw.randint(1, longest)))
            turns = [
                {"role": "human", "content": f"{folder.name} {number}: what comes next?"},
                {"role": "bot", "content": f"it is {answer}"},
            ]
            file.write(json.dumps({"id": number, "data_name": folder.name, "chat_rounds": turns}) + "\n")
    return folder


def two_tasks(folder: Path) -> str:
    """Returns the override that names two tasks of 60 and 25 rows under `folder`."""
    return f"data.paths=[{write_task(folder / 'adding', 60)},{write_task(folder / 'naming', 25, longest=3)}]"


def train(
    tmp_path: Path, cache_dir: Path, *overrides: str, out: str = "run", pictures: bool = False
) -> tuple[dict[str, Any], Path]:
    """Trains `debug=fast` in this process; returns (summary, run folder).

    pictures: draw those of report/, which takes longer than the steps.
    """
    folder = tmp_path / out
    given = [
        "debug=fast",
        "launch=inline",
        f"cache_dir={cache_dir}",
        f"output_dir={folder}",
        two_tasks(tmp_path / "tasks"),
        *overrides,
    ]
    cfg = compose_resolved(given)
    checked = job.checked(cfg, given)
    chosen, _ = checked.choose(dated=False)
    gc.freeze()  # what is imported by now, or the collector walks over it at the end of every run
    with nullcontext() if pictures else undrawn():
        return launch(checked, chosen), chosen


@contextmanager
def undrawn() -> Iterator[None]:
    """Leaves out the pictures of report/."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss_curves", "task_weights"):
            patch.setattr(plots, name, lambda rows, folder: None)
        yield


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Stops every run within it after a step, as by a signal that comes in this step."""
    fit = mft.run.fit

    def stopped(t: Trainer) -> RunStatus:
        t.stop_requested = lambda: t.state.step >= step - 1
        return fit(t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mft.run, "fit", stopped)
        yield


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in rows]


def resume(tmp_path: Path, cache_dir: Path, *overrides: str, step: int, out: str = "run") -> dict[str, Any]:
    """Trains on from the checkpoint of `step`, as if the finished run in `out` had been killed right after
    it."""
    run_dir = tmp_path / out
    kept = run_dir / "checkpoints" / f"step-{step}"
    for folder in (run_dir / "final", *(run_dir / "checkpoints").iterdir()):
        if folder != kept:
            shutil.rmtree(folder)
    (run_dir / "summary.json").unlink()
    written = kept.stat().st_ino
    summary, _ = train(tmp_path, cache_dir, *overrides, out=out)
    assert kept.stat().st_ino == written, "the run began anew"
    return summary
