"""Losses of single rows in RUN/sample_losses: `valid-<step>.parquet` and `test-<step>.parquet`.

A line stands for a conversation of a task: samples, spans and repeats of one conversation are added up. Its
key is the digest of the conversation, so that lines of two runs can be paired whatever their tasks, order,
layout or number of ranks. Nothing but a comparison reads these files; a person may remove them.

Shapes: N samples of a batch, or lines; `sums_2N` the rows [sum of token losses in nats, trained tokens].
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mft.batch import IGNORE, Batch
from mft.distributed.engine import Engine
from mft.files.atomic import write_bytes
from mft.files.json_file import read_json
from mft.training.best import BestTracker
from mft.training.checkpoint import marked_steps
from mft.training.settings import KeptLosses

if TYPE_CHECKING:
    import numpy as np
    import pandas
    import torch

FOLDER = "sample_losses"


class SampleSums:
    """Adds up the token losses of each sample of one evaluation, on the device: nothing waits for it."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []
        self._samples: list[tuple[int, int]] = []

    def add(self, nll_BT: torch.Tensor, batch: Batch) -> None:
        """Takes the token losses of a micro-batch, 0 where nothing is trained."""
        import torch

        # as in `task_sums`: what is not trained goes to an extra sample, N, that is cut off
        count = len(batch.samples)
        sample_m = torch.where(batch.target_BT != IGNORE, batch.sample_BT, count).flatten()
        loss_m = nll_BT.detach().flatten().double()
        sums_2N = torch.zeros(2, count + 1, dtype=torch.float64, device=nll_BT.device)
        sums_2N.scatter_add_(1, sample_m.expand(2, -1), torch.stack([loss_m, torch.ones_like(loss_m)]))
        self._sums.append(sums_2N[:, :count])
        self._samples += batch.samples

    def lines(self, digests: Callable[[int, np.ndarray], np.ndarray]) -> Lines:
        """Returns this rank's lines. digests: of the samples of a task, by their indices in its store."""
        import numpy as np
        import torch

        task_N, index_N = np.array(self._samples, dtype=np.int64).reshape(-1, 2).T
        loss_N, tokens_N = torch.cat(self._sums, 1).cpu().numpy() if self._sums else np.zeros((2, 0))
        row_N = np.zeros(len(task_N), np.uint64)
        for task in np.unique(task_N).tolist():
            row_N[task_N == task] = digests(task, index_N[task_N == task])
        return merged([Lines(task_N, row_N, tokens_N, loss_N)])


class Lines(NamedTuple):
    """N lines: index of the task, digest of the conversation, trained tokens, sum of their losses in nats."""

    task_N: np.ndarray
    row_N: np.ndarray
    tokens_N: np.ndarray
    loss_N: np.ndarray


def merged(parts: Sequence[Lines]) -> Lines:
    """Returns the lines of all parts by task and row, those of equal task and row as one."""
    import numpy as np

    task_N, row_N, tokens_N, loss_N = map(np.concatenate, zip(*parts, strict=True))
    order = np.lexsort((row_N, task_N))
    task_N, row_N = task_N[order], row_N[order]
    first_N = np.ones(len(order), bool)
    first_N[1:] = (np.diff(task_N) != 0) | (row_N[1:] != row_N[:-1])
    line_N = np.cumsum(first_N) - 1
    sums = (np.bincount(line_N, values[order]) for values in (tokens_N, loss_N))
    return Lines(task_N[first_N], row_N[first_N], *sums)


@dataclass
class SampleLosses:
    """Writes the files of one run and removes those that are not kept. All ranks call it, rank 0 writes."""

    run_dir: Path
    engine: Engine
    names: Sequence[str]
    """Of the K tasks, in order."""
    digests: Callable[[int, np.ndarray], np.ndarray]
    """(task, indices in its store [N]) → digests of their conversations, uint64 [N]."""
    kept: KeptLosses = KeptLosses.best

    def write(self, split: str, step: int, sums: SampleSums) -> None:
        """Writes the file of an evaluation; where the disk does not take it, warns and goes on."""
        parts = self.engine.gather(sums.lines(self.digests))
        if self.engine.is_main:
            self._write(_path(self.run_dir, split, step), merged(parts))
        self.engine.barrier()

    def _write(self, path: Path, lines: Lines) -> None:
        try:
            # durable: a checkpoint counts on that of the best validation
            write_bytes(path, _parquet(lines, self.names), durable=True)
        except OSError as error:
            why = error.strerror or error
            warnings.warn(f"{path} was not written: {why}. Training continues", stacklevel=2)

    def prune(self, best: BestTracker, tested: int | None = None) -> None:
        """Removes the files that are not kept. tested: the step of the test, once the run has made it."""
        if not self.engine.is_main or self.kept is not KeptLosses.best:
            return
        first, checkpoints = min(_steps(self.run_dir, "valid"), default=0), self.run_dir / "checkpoints"
        keep = {first, best.step, best.last_step}
        # a run that is resumed there finds its best validation, too
        for step in marked_steps(checkpoints):
            saved = read_json(checkpoints / f"step-{step}" / "state" / "loop.json").part("best")
            keep.add(int(saved.number("step") or 0))
        _remove(self.run_dir, "valid", lambda step: step not in keep)
        if tested is not None:
            _remove(self.run_dir, "test", lambda step: step != tested)


def discard_after(run_dir: Path, step: int) -> None:
    """Removes the files of later steps, which a run that goes on from this one makes again."""
    for leftover in (run_dir / FOLDER).glob("*.tmp"):  # of a kill while writing
        leftover.unlink(missing_ok=True)
    for split in ("valid", "test"):
        _remove(run_dir, split, lambda other: other > step)


def read(run_dir: Path, split: str, step: int) -> pandas.DataFrame | None:
    """Returns the lines of a validation or test of a run, None where they were not kept or are damaged.

    split: valid or test. Columns: task (categorical), row (uint64, the digest), tokens (int32), loss
    (float32, a sum in nats).
    """
    import pyarrow
    from pyarrow import parquet

    try:
        # partitioning: names of folders, such as lr=1e-4, are no columns
        table = parquet.read_table(_path(run_dir, split, step), columns=_schema().names, partitioning=None)
        return table.cast(_schema()).to_pandas()
    except (OSError, pyarrow.ArrowException):
        return None


def _schema() -> Any:
    import pyarrow as pa

    task = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([("task", task), ("row", pa.uint64()), ("tokens", pa.int32()), ("loss", pa.float32())])


def _parquet(lines: Lines, names: Sequence[str]) -> bytes:
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    tasks, place_N = np.unique(lines.task_N, return_inverse=True)
    task = pa.DictionaryArray.from_arrays(place_N.astype("int32"), [names[number] for number in tasks])
    columns = [task, lines.row_N, lines.tokens_N.astype("int32"), lines.loss_N.astype("float32")]
    file = io.BytesIO()
    table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=_schema())
    # digests and losses hardly repeat: a dictionary of them would only add to the file
    parquet.write_table(table, file, compression="zstd", use_dictionary=["task", "tokens"])
    return file.getvalue()


def _path(run_dir: Path, split: str, step: int) -> Path:
    return run_dir / FOLDER / f"{split}-{step}.parquet"


def _steps(run_dir: Path, split: str) -> list[int]:
    names = [path.stem.removeprefix(f"{split}-") for path in (run_dir / FOLDER).glob(f"{split}-*.parquet")]
    return [int(name) for name in names if name.isdigit()]


def _remove(run_dir: Path, split: str, unwanted: Callable[[int], bool]) -> None:
    for step in filter(unwanted, _steps(run_dir, split)):
        _path(run_dir, split, step).unlink(missing_ok=True)
