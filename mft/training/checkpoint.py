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
from dataclasses import dataclass
from pathlib import Path

from mft.distributed.engine import Engine
from mft.errors import UserError, is_full_disk
from mft.files.atomic import publish, remove
from mft.files.checksums import COMPLETE, damage, digest, measure, seal
from mft.files.disk import free_bytes
from mft.files.json_file import write_json
from mft.loss.base import TaskLoss
from mft.training.settings import KeptState
from mft.training.state import State
from mft.training.weights_only import is_weights_only, reduce_to_weights


@dataclass(frozen=True)
class ModelExport:
    """What writes the model as transformers or peft load it."""

    write: Callable[[Path], None]
    """Writes it to a folder; all ranks call it."""
    size: int
    """Bytes of its weights."""


RECORD = "record.json"
"""In state/: how much metrics.jsonl held when the checkpoint was written."""


@dataclass
class Checkpoints:
    """The `checkpoints/step-N` folders of one run. All ranks call `save`; rank 0 renames and removes."""

    run_dir: Path
    engine: Engine
    loss: TaskLoss
    export: ModelExport
    keep: int | None
    """Newest checkpoints that stay beside the best one; None: all."""
    keep_task_best: bool = False
    """Whether the best one of each task stays, too."""
    save_state: KeptState = KeptState.all
    """Which checkpoints keep what a resume needs beyond the weights."""

    def save(self, state: State) -> Path:
        """Writes the checkpoint of `state.step`, makes it count, and prunes."""
        import torch

        folder, engine = self.run_dir / "checkpoints", self.engine
        self.require_room()
        with written(folder / f"step-{state.step}", self.run_dir, engine) as temporary:
            self.export.write(temporary)
            engine.save_state(temporary / "state")
            if engine.is_main:
                torch.save(self.loss.state_dict(), temporary / "state" / "loss.pt")
                position = json.dumps(state.as_dict(), indent=2)
                (temporary / "state" / "loop.json").write_text(position, encoding="utf-8")
                write_json(temporary / "state" / RECORD, record_of(self.run_dir / "metrics.jsonl"))
            engine.barrier()
            # each rank flushes and sums up what it wrote: on several machines the others would fetch it first
            files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
            own_files = [path for path in files if _writer(path) == engine.rank]
            sums: dict[str, tuple[int, str]] = {}
            for part in engine.gather(measure(temporary, own_files)):
                sums |= part
            if engine.is_main:
                # a resumed run counts on the rows up to this step
                _flush(self.run_dir / "metrics.jsonl")
                seal(temporary, COMPLETE, sums)
        if engine.is_main:
            self._prune(folder, state)
        engine.barrier()
        return folder / f"step-{state.step}"

    def require_room(self) -> None:
        """Raises UserError where the disk has no room for a checkpoint as it would be now; all ranks call it.

        Checkpoints that `save` removes do so when the new one is complete: their room is not free yet.
        """
        own = self.engine.state_size() + (self.export.size if self.engine.is_main else 0)
        require_room(self.run_dir, "checkpoint", own, self.engine)

    def _prune(self, folder: Path, state: State) -> None:
        """Removes the oldest complete checkpoints over the limit, and what older ones are not to keep."""
        best_of_tasks = state.best.task_saved_step.values() if self.keep_task_best else ()
        protected = {state.step, state.best.saved_step, *best_of_tasks}
        for step in complete_steps(folder)[: -self.keep] if self.keep else ():
            if step not in protected:
                remove(folder / f"step-{step}")
        older = (step for step in complete_steps(folder) if step != state.step)
        for step in older if self.save_state is KeptState.last else ():
            reduce_to_weights(folder / f"step-{step}")


def write_final(run_dir: Path, engine: Engine, export: ModelExport) -> None:
    """Writes the trained model to final/. All ranks call it."""
    require_room(run_dir, "final model", export.size if engine.is_main else 0, engine)
    with written(run_dir / "final", run_dir, engine) as temporary:
        export.write(temporary)
        if engine.is_main:
            seal(temporary)


@contextmanager
def written(final: Path, run_dir: Path, engine: Engine) -> Iterator[Path]:
    """Context in which all ranks write what becomes the folder `final`, which is complete or absent.

    `require_room`, which comes first, has removed what a killed process left there.
    On a full disk the temporary folder is removed and a UserError raised.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    if engine.is_main:
        # fails if one could not be removed: what it holds must not be sealed as part of the new folder
        temporary.mkdir(parents=True)
    try:
        with engine.patient():
            engine.barrier()  # no rank writes before the folder exists
            yield temporary
    except Exception as error:
        # json, safetensors and torch raise kinds of their own, torch without the reason: hence the free space
        free = free_bytes(run_dir)
        # a rank that found the disk full removes the folder, also while the others still write to it
        removed = not temporary.exists() and not isinstance(error, UserError)
        if not (is_full_disk(error) or free <= 2**20 or removed):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        message = f"The disk is full: {temporary} could not be written ({_mib(free)} MiB were free)."
        raise UserError(f"{message} {_how_to_make_room(run_dir)}") from error
    if engine.is_main:
        publish(temporary, final)
    engine.barrier()  # no rank continues before it is complete


def require_room(run_dir: Path, what: str, own: int, engine: Engine) -> None:
    """Raises UserError, on all ranks, where the disk of a run has no room for what they are about to write.

    what: its name; own: bytes that this rank will write. All ranks write to the folder of rank 0, those of
    other machines, too. Small files are not counted: what is refused could not have been written.
    """
    free = 0
    if engine.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        # first what killed saves left behind
        for leftover in (*run_dir.glob("checkpoints/.step-*.tmp"), *run_dir.glob(".final.*tmp")):
            shutil.rmtree(leftover, ignore_errors=True)
        free = free_bytes(run_dir)
    engine.barrier()
    of_ranks = engine.gather((own, free))
    needed, free = sum(size for size, _ in of_ranks), of_ranks[0][1]
    if needed > free:
        message = f"{run_dir}: the disk has no room for the {what}, which takes {_mib(needed)} MiB "
        raise UserError(f"{message}({_mib(free)} MiB are free). {_how_to_make_room(run_dir)}")


def _how_to_make_room(run_dir: Path) -> str:
    if not (older := newest(run_dir)):
        return "Make room."
    # by hand: the settings take effect when the next checkpoint is complete
    return (
        f"Make room, for instance by removing checkpoints older than {older.name}: the same command resumes "
        "from that one. With a smaller train.keep, or train.save_state=last, a run takes less room."
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def restore(folder: Path, state: State, engine: Engine, loss: TaskLoss) -> bool:
    """Puts a checkpoint back into state, module, optimizer, the loss's memory and the random states.

    All ranks call it, last before training continues. Returns whether the layout is the one that wrote it, so
    that the run continues bit-identically. Raises UserError when the checkpoint does not fit.
    """
    import torch

    values = json.loads((folder / "state" / "loop.json").read_text(encoding="utf-8"))
    if unknown := set(values) - set(state.as_dict()):
        raise UserError(f"{folder} is of another version of mft: unknown {', '.join(sorted(unknown))}.")
    # in place: the trainer holds this object
    vars(state).update(vars(State.from_dict(values)))
    loss.load_state_dict(torch.load(folder / "state" / "loss.pt", weights_only=True))
    # last: it restores the random states, and nothing may draw from them before training does
    return engine.load_state(folder / "state")


def record_of(path: Path) -> dict[str, int | str]:
    """Returns the size of the rows logged so far, and their xxh3-128: nothing that follows changes them."""
    size = path.stat().st_size if path.exists() else 0
    return {"bytes": size, "xxh3": digest(path, size) if size else ""}


def _writer(path: Path) -> int:
    """Returns the rank that wrote a file of a checkpoint."""
    by_rank = re.fullmatch(r"(shard|optimizer|rng)-(\d+)\.\w+", path.name)
    return int(by_rank[2]) if by_rank else 0


def _flush(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def marked_steps(folder: Path) -> list[int]:
    """Returns the steps of a `checkpoints` folder whose checkpoints were written to their end, ascending."""
    names = [path.parent.name.removeprefix("step-") for path in folder.glob(f"step-*/{COMPLETE}")]
    return sorted(int(name) for name in names if name.isdigit())


def complete_steps(folder: Path) -> list[int]:
    """Returns the steps of those whose files are all there in full length; their content is not read."""
    steps = marked_steps(folder)
    return [step for step in steps if not damage(folder / f"step-{step}", COMPLETE, hashed=False)]


def newest(run_dir: Path) -> Path | None:
    """Returns the newest complete checkpoint that a run can be resumed from, or None."""
    folders = [run_dir / "checkpoints" / f"step-{step}" for step in complete_steps(run_dir / "checkpoints")]
    return next((folder for folder in reversed(folders) if not is_weights_only(folder)), None)
