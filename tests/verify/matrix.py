"""Cells of `mft verify-resume` played in ranks that are already up: what the command does, without a start for
each run."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mft.config.schema import freeze
from mft.training.trace import Trace
from mft.verify.cells import Cell, check_all
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import FORCED, write_tasks

AT, STEPS = 5, 10
"""The stop is after a step at which a validation is due, which is left to the resumed run; it is within a window
of dwa, between two probes of coba, and before the warm-up of both histories ends."""

DISTS = ("single", "ddp", "zero2", "zero3", "fsdp")
PEFTS = {"full": (), "lora": ("peft.dropout=0.1",), "qlora": ("peft.dropout=0.1",)}
ROWS = ("pad", "pack")
LOSSES = {
    "task_token_mean": (),
    "self_paced": ("loss.warmup_steps=3", "loss.history_length=3"),
    "coba": ("loss.warmup_steps=6", "loss.update_interval=2", "loss.history_length=4"),
    "famo": (),
    "famo_valid": (),
    "dwa": ("loss.window=3",),
    "lbtw": ("loss.reset_every=4",),
    "uncertainty": (),
}
"""Modes, with settings by which their weights move within STEPS."""

Key = tuple[str, str, str, str]
"""dist, peft, data, loss."""

ALL: list[Key] = list(itertools.product(DISTS, PEFTS, ROWS, LOSSES))

SETTINGS = (
    "debug=fast",
    "train.epochs=100",
    "train.eval_every=5",
    "train.save_every=null",
    "train.gradient_accumulation_steps=2",
    "data.seq_length=96",
    "optimizer.lr=2e-3",
)


def checked(root: Path, keys: Iterable[Key]) -> dict[Key, Cell]:
    """Writes two tasks, and composes and checks the cells on them."""
    tasks = ",".join(map(str, write_tasks(root / "tasks")))
    common = [*SETTINGS, f"cache_dir={root / 'cache'}", f"data.paths=[{tasks}]"]
    cells = {}
    for key in keys:
        dist, peft, data, loss = key
        chosen = [f"dist={dist}", f"peft={peft}", f"data={data}", f"loss={loss}"]
        own = [*FORCED.get(dist, []), *PEFTS[peft], *LOSSES[loss]]
        cells[key], *_ = check_all([*common, *chosen, *own], [], STEPS)
    return cells


def frozen(root: Path, cells: dict[Key, Cell]) -> dict[Key, list[Path]]:
    """Freezes two runs of every cell that was not refused; returns their folders: straight, resumed."""
    folders = {}
    for key, cell in cells.items():
        folders[key] = [root / "-".join(key) / name for name in ("uninterrupted", "resumed")]
        for folder in folders[key] if cell.job else ():
            cell.job.cfg.output_dir = str(folder)
            freeze(cell.job.cfg, folder / "config.yaml")
    return folders


def play(runs: Sequence[tuple[Path, Trace]]) -> None:
    """Runs each frozen run in this rank, as `mft.launch.worker` does, without a word and without pictures."""
    from mft.launch import worker
    from mft.training import plots

    plots.loss_curves = plots.task_weights = lambda *paths: None  # type: ignore[assignment]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for folder, trace in runs:
            worker.run_job(str(folder), trace)
            assert worker.stop() == (trace.stop_at is not None), folder
            gc.freeze()  # what the run has imported, or the collector walks over it after every further run
    worker.stop.listen()  # the stop was of one run; this rank ends as one that was not signalled


def play_all(cells: dict[Key, Cell], folders: dict[Key, list[Path]], resume: bool) -> None:
    """Plays every cell straight through and up to its stop, or resumes it, in new ranks."""
    for ranks in (1, 2):
        own = [folders[key] for key, cell in cells.items() if cell.job and cell.job.world == ranks]
        first = [run for whole, parts in own for run in ((whole, Trace()), (parts, Trace(stop_at=AT)))]
        if own:
            run_ranks(ranks, play, [(parts, Trace()) for _, parts in own] if resume else first)
