"""What each rank of a run was given in every step, for `mft verify-resume`, which compares two runs by it.

No setting turns it on: that command alone passes a `Trace` to the ranks it starts. The losses, norms and
weights of the steps are in metrics.jsonl, to the bit.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import xxhash

from mft.batch import Batch, StepBatches
from mft.training.state import State
from mft.training.trainer import StepSource

FOLDER = "trace"
"""In the run folder; holds rank-<r>.jsonl of every rank, to which a resumed run appends."""


@dataclass(frozen=True)
class Trace:
    """Asks a run for its trace, and, if wanted, to stop."""

    stop_at: int | None = None
    """The step in which every rank gets a SIGTERM, as from a scheduler; None: the run trains to its end."""

    def steps_of(self, source: StepSource, state: State, run_dir: Path, rank: int) -> StepSource:
        """Returns the source of a rank's steps, which also writes its trace. state: of the trainer."""
        return _TracedSteps(source, state, run_dir / FOLDER / f"rank-{rank}.jsonl", self.stop_at)


@dataclass(frozen=True)
class _TracedSteps:
    source: StepSource
    state: State
    path: Path
    stop_at: int | None

    def steps(self, epoch: int, rows_consumed: int, count: int) -> Generator[StepBatches]:
        self.path.parent.mkdir(exist_ok=True)
        first, coming = self.state.step + 1, self.source.steps(epoch, rows_consumed, count)
        with self.path.open("a", encoding="utf-8") as file, closing(coming):
            for step, data in enumerate(coming, start=first):
                file.write(json.dumps({"step": step, "batches": digest(data.batches)}) + "\n")
                file.flush()
                if step == self.stop_at:
                    signal.raise_signal(signal.SIGTERM)
                yield data


def digest(batches: Sequence[Batch]) -> str:
    """Returns the xxh3-128, in hex, of all tensors of a step's micro-batches, in their order."""
    whole = xxhash.xxh3_128()
    for batch in batches:
        for tensor in (batch.ids_BT, batch.target_BT, batch.task_BT, batch.sample_BT, batch.position_BT):
            whole.update(repr(tuple(tensor.shape)).encode())
            whole.update(tensor.cpu().numpy().tobytes())
    return whole.hexdigest()


def read(run_dir: Path) -> dict[int, list[tuple[int, str]]]:
    """Returns {rank: [(step, digest of its batches)]} of a run folder, in the order of training."""
    found = {}
    for path in sorted((run_dir / FOLDER).glob("rank-*.jsonl")):
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        rank = int(path.stem.removeprefix("rank-"))
        found[rank] = [(int(line["step"]), str(line["batches"])) for line in lines]
    return found
