"""Checkpoints that are complete or absent: written to a temporary folder, marked complete, renamed.

step-N/ holds the model as transformers or peft load it, and in state/ what an exact resume needs besides.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mft.errors import UserError, is_full_disk
from mft.files.atomic import publish, remove
from mft.files.checksums import COMPLETE, damage, measure, seal
from mft.loss.base import TaskLoss
from mft.training.state import State


class Checkpoints:
    """The `checkpoints/step-N` folders of one run. All ranks call `save`; rank 0 alone renames and removes.

    export: writes the model to a folder (all ranks call it); keep: newest ones that stay beside the best,
    None = all; keep_task_best: whether the best one of each task stays, too.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Any,
        loss: TaskLoss,
        export: Callable[[Path], None],
        keep: int | None,
        keep_task_best: bool = False,
    ):
        self.folder = run_dir / "checkpoints"
        self.engine, self.loss, self.export, self.keep = engine, loss, export, keep
        self.keep_task_best = keep_task_best

    def save(self, state: State) -> Path:
        """Writes the checkpoint of `state.step`, makes it count, and prunes."""
        import torch

        final = self.folder / f"step-{state.step}"
        temporary = self.folder / f".step-{state.step}.tmp"
        if self.engine.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "state").mkdir(parents=True)
        self.engine.barrier()
        with full_disk_reported(temporary, self.folder.parent):
            self.export(temporary)
            self.engine.save_state(temporary / "state")
            if self.engine.is_main:
                torch.save(self.loss.state_dict(), temporary / "state" / "loss.pt")
                (temporary / "state" / "loop.json").write_text(
                    json.dumps(state.as_dict(), indent=2), encoding="utf-8"
                )
            self.engine.barrier()
            # each rank flushes and sums up what it wrote: on several machines the others would fetch it first
            mine = [
                path for path in temporary.rglob("*") if path.is_file() and _writer(path) == self.engine.rank
            ]
            parts = self.engine.gather(measure(temporary, sorted(mine)))
            if self.engine.is_main:
                # a resumed run counts on the rows up to this step
                _flush(self.folder.parent / "metrics.jsonl")
                seal(temporary, COMPLETE, {name: entry for part in parts for name, entry in part.items()})
        if self.engine.is_main:
            publish(temporary, final)
            best_of_tasks = state.best.task_saved_step.values() if self.keep_task_best else ()
            self._prune(protect={state.step, state.best.saved_step, *best_of_tasks})
        self.engine.barrier()
        return final

    def _prune(self, protect: set[int]) -> None:
        """Removes the oldest complete checkpoints over the limit, and what killed saves left behind."""
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for step in complete_steps(self.folder)[: -self.keep] if self.keep else ():
            if step not in protect:
                remove(self.folder / f"step-{step}")


def write_final(run_dir: Path, engine: Any, export: Callable[[Path], None]) -> None:
    """Writes the trained model to final/, which is whole or absent. All ranks call it.

    export: writes the model to a folder (all ranks call it).
    """
    temporary = run_dir / ".final.tmp"
    if engine.is_main:
        for leftover in run_dir.glob(".final*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
    engine.barrier()
    with full_disk_reported(temporary, run_dir):
        export(temporary)
        if engine.is_main:
            seal(temporary)
    if engine.is_main:
        publish(temporary, run_dir / "final")
    engine.barrier()


@contextmanager
def full_disk_reported(folder: Path, run_dir: Path) -> Iterator[None]:
    """Context in which a folder of a run is written: where the disk is full it is removed, and a UserError
    raised."""
    try:
        yield
    except (
        Exception
    ) as error:  # json, safetensors and torch each raise a kind of their own, torch's without the reason
        free = shutil.disk_usage(run_dir).free
        if not is_full_disk(error) and free > 2**20:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        older = newest(run_dir)
        resumes = f"; the same command then resumes from {older.name}" if older else ""
        raise UserError(
            f"The disk is full: {folder} could not be written ({free / 2**20:,.0f} MiB were free). Make "
            f"room, or keep fewer checkpoints (train.keep){resumes}"
        ) from error


def restore(folder: Path, state: State, engine: Any, loss: TaskLoss) -> bool:
    """Puts a checkpoint back into state, module, optimizer, the loss's memory and the random states.

    All ranks call it, last before training continues. Returns whether the layout is the one that wrote it, so
    that the run continues bit-identically. Raises UserError when the checkpoint does not fit.
    """
    import torch

    values = json.loads((folder / "state" / "loop.json").read_text(encoding="utf-8"))
    if unknown := set(values) - set(state.as_dict()):
        raise UserError(
            f"{folder} was written by another version of mft: it holds {', '.join(sorted(unknown))}."
        )
    vars(state).update(vars(State.from_dict(values)))
    loss.load_state_dict(torch.load(folder / "state" / "loss.pt", weights_only=True))
    same_layout: bool = engine.load_state(folder / "state")
    return same_layout


def _writer(path: Path) -> int:
    """Returns the rank that wrote a file of a checkpoint."""
    own = re.fullmatch(r"(shard|rng)-(\d+)\.\w+", path.name)
    return int(own[2]) if own else 0


def _flush(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def marked_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a `checkpoints` folder that were written to their end,
    ascending."""
    if not folder.is_dir():
        return []
    names = (p.name.removeprefix("step-") for p in folder.glob("step-*") if (p / COMPLETE).is_file())
    return sorted(int(name) for name in names if name.isdigit())


def complete_steps(folder: Path) -> list[int]:
    """Returns the steps of those whose files are all there in full length; their content is not read."""
    return [
        step for step in marked_steps(folder) if not damage(folder / f"step-{step}", COMPLETE, hashed=False)
    ]


def newest(run_dir: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None."""
    steps = complete_steps(run_dir / "checkpoints")
    return run_dir / "checkpoints" / f"step-{steps[-1]}" if steps else None
