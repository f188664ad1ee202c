"""The vocabulary that data, losses and engines share.

Shape legend, used as name suffixes everywhere: B rows of a micro-batch, T positions of a row, S tokens of one
sample, N samples in a batch, K tasks, V vocabulary, H hidden width. `nll_BT` is a tensor of shape [B, T].
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mft.hardware import send

if TYPE_CHECKING:
    import numpy
    import torch

IGNORE = -100
"""Value of `target_BT` where no loss is taken (the ignore index of torch's cross entropy)."""


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "bot": "assistant"}
"""What a turn may be called → its role."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, or a text to be continued."""

    role: str
    """system, user, assistant, or text (continued pretraining; such a message stands alone)."""
    content: str
    train: bool = True
    """Whether an assistant turn carries loss."""
    pair: bool = False
    """Whether the row is a question and its answer, and can hold no more; MFTCoder writes such otherwise."""


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered before and after training (train.prompts)."""

    task: str
    """The row's data_name, "" without one."""
    messages: list[dict[str, str]]
    """Role and content of each turn; the last one is the user's."""
    expected: str = ""
    """A reference answer, or ""."""


class Span(NamedTuple):
    """The tokens start..stop-1 of a sample, for rows that cut samples."""

    sample: int
    """Its number, as in a row of uncut samples."""
    start: int
    stop: int


Row = list[int | Span]
"""Numbers of the samples in one row, or spans of them; [] is a row of padding."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised training sample, or a span of one."""

    ids_S: numpy.ndarray
    """int32 token ids."""
    trained_S: numpy.ndarray
    """bool: whether the token is a training target."""
    task: int
    """Index of its task, 0..K-1."""
    index: int = -1
    """Its number inside the task's store, by which errors name its file and line."""
    following: int = IGNORE
    """The id that comes after a span where that is a training target, else IGNORE."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of a micro-batch are, and how many; found on the CPU, where the batch is made.

    Forward and losses use it instead of asking the device (`nonzero`, `any`, boolean masks), for which the
    host would have to wait until everything before has been computed. Positions count over the B * T
    flattened ones. The tensors move with the batch, the rest stays on the host.
    """

    tokens: int
    """Tokens, trained or not, without padding."""
    packed: bool
    """Whether a row holds more than one sample."""
    tokens_K: numpy.ndarray
    """int64, trained tokens by task; it ends with the last task that has any."""
    samples_K: numpy.ndarray
    """int64, samples with a trained token by task; likewise."""
    lengths: list[int]
    """Tokens of each sample as in `row_m`."""
    cu_seqlens: torch.Tensor
    """int32 [N + 1], where each sample starts in `row_m`, and its end."""
    row_m: torch.Tensor
    """int64, the position of each token, row after row. Of a batch without tokens the first padding, since
    every rank runs every forward."""
    trained_n: torch.Tensor
    """int64, the positions that carry loss."""
    trained_in_row_n: torch.Tensor
    """int64, the same as indices into `row_m`."""

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        """Finds the layout of a micro-batch, 0.1 ms for 4,096 tokens."""
        import numpy as np
        import torch

        tensors = (batch.target_BT, batch.task_BT, batch.sample_BT, batch.position_BT)
        target_m, task_m, sample_m, position_m = (tensor.cpu().numpy().ravel() for tensor in tensors)
        present_m = sample_m >= 0
        tokens = int(np.count_nonzero(present_m))
        row_m = np.flatnonzero(present_m) if tokens else np.zeros(1, np.int64)
        starts_m = position_m[row_m] == 0
        starts_m[0] = True
        start_N = np.flatnonzero(starts_m)
        border_N1 = np.append(start_N, len(row_m))
        row_N = row_m[start_N] // batch.ids_BT.shape[1]
        trained_n = np.flatnonzero(target_m != IGNORE)
        # A sample is one run of tokens, so the first trained one of each stands for it.
        first_n = np.diff(sample_m[trained_n], prepend=-1) != 0
        return cls(
            tokens=tokens,
            packed=bool((np.diff(row_N) == 0).any()),
            tokens_K=np.bincount(task_m[trained_n]),
            samples_K=np.bincount(task_m[trained_n][first_n]),
            lengths=np.diff(border_N1).tolist(),
            cu_seqlens=torch.from_numpy(border_N1.astype(np.int32)),
            row_m=torch.from_numpy(row_m),
            trained_n=torch.from_numpy(trained_n),
            trained_in_row_n=torch.from_numpy((np.cumsum(present_m) - 1)[trained_n]),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank; all tensors are int64. A row may hold samples of several tasks."""

    ids_BT: torch.Tensor
    """Token ids (the pad id where sample_BT is -1)."""
    target_BT: torch.Tensor
    """The next token of the same sample where that is trained, IGNORE elsewhere."""
    task_BT: torch.Tensor
    """Task of the token, -1 = padding."""
    sample_BT: torch.Tensor
    """Number of the sample inside this batch (0..N-1), -1 = padding; attention stays inside a sample."""
    position_BT: torch.Tensor
    """Position inside the sample, from 0."""
    samples: tuple[tuple[int, int], ...] = ()
    """(task, index) of each of the N samples, to name them in errors."""
    layout: Layout = field(init=False, repr=False)
    """Found from the tensors when the batch is made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", Layout.of(self))

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device`; the host does not wait for the copies."""
        # copies, since `replace` would find the layout again, on the device
        moved = copy(self)
        object.__setattr__(moved, "layout", copy(self.layout))
        for part, names in ((moved, _TENSORS), (moved.layout, _INDICES)):
            for name in names:
                object.__setattr__(part, name, send(getattr(part, name), device))
        return moved


_TENSORS = ("ids_BT", "target_BT", "task_BT", "sample_BT", "position_BT")
_INDICES = ("cu_seqlens", "row_m", "trained_n", "trained_in_row_n")


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one optimizer step holds, the denominators of its losses; global once summed with `Engine.sum`.

    It stays on the CPU: the weights of a loss are made from it.

    All are floats, so that one all-reduce of one float64 vector adds them up; float64 is exact up to 2**53.
    """

    tokens_K: torch.Tensor
    """Trained tokens of each task."""
    samples_K: torch.Tensor
    """Samples of each task that have a trained token."""
    micro_batches: float
    """Micro-batches that have a trained token."""
    stop: float = 0.0
    """Ranks that were asked to stop."""
    processed: float = 0.0
    """All tokens, trained or not, without padding."""
    positions: float = 0.0
    """The same with padding."""

    @property
    def trained(self) -> float:
        """Trained tokens of all tasks."""
        return float(self.tokens_K.sum())

    @classmethod
    def of(cls, batches: Iterable[Batch], tasks: int, stop: bool = False) -> StepCounts:
        """Counts the micro-batches of one rank; `tasks` is K."""
        import torch

        tokens_K = torch.zeros(tasks, dtype=torch.float64)
        samples_K = torch.zeros(tasks, dtype=torch.float64)
        micro_batches = processed = positions = 0
        for batch in batches:
            layout = batch.layout
            tokens_K[: len(layout.tokens_K)] += torch.from_numpy(layout.tokens_K)
            samples_K[: len(layout.samples_K)] += torch.from_numpy(layout.samples_K)
            micro_batches += len(layout.trained_n) > 0
            processed += layout.tokens
            positions += batch.ids_BT.numel()
        counts = (float(count) for count in (micro_batches, stop, processed, positions))
        return cls(tokens_K, samples_K, *counts)

    def tensor(self) -> torch.Tensor:
        """Returns the float64 vector [2K + 4] that one all-reduce sums over the ranks."""
        import torch

        tail = [self.micro_batches, self.stop, self.processed, self.positions]
        return torch.cat([self.tokens_K, self.samples_K, torch.tensor(tail, dtype=torch.float64)])

    @classmethod
    def from_tensor(cls, vector: torch.Tensor) -> StepCounts:
        """Inverse of `tensor`."""
        tasks = (vector.numel() - 4) // 2
        return cls(vector[:tasks], vector[tasks : 2 * tasks], *vector[-4:].tolist())


@dataclass(frozen=True, slots=True)
class StepBatches:
    """The micro-batches of one rank for one optimizer step, and where the data stands after it."""

    batches: list[Batch]
    epoch: int
    """The epoch of the next row, from 0."""
    rows_consumed: int
    """Rows of that epoch's order that are done."""
    epochs_done: float
    """Passes over the mixture, with a fraction; the metric `epoch`."""


@dataclass(frozen=True)
class BatchSizes:
    """Rows (packed) or samples (padded) of one optimizer step: global = per_device x accumulation x world."""

    per_device: int
    """Rows of one micro-batch."""
    accumulation: int
    """Micro-batches of one step on each rank."""
    world: int
    """Ranks on all machines."""
    found: bool = True
    """False while the rows of a micro-batch are still to be found, by memory."""

    @property
    def total(self) -> int:
        """The global batch."""
        return self.per_device * self.accumulation * self.world

    def with_rows(self, per_device: int) -> BatchSizes:
        """Returns the same step in micro-batches of so many rows, a divisor of a rank's."""
        rows = self.per_device * self.accumulation
        assert rows % per_device == 0, f"{rows} rows in micro-batches of {per_device}"
        return BatchSizes(per_device, rows // per_device, self.world)
