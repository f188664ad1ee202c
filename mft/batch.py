"""The vocabulary that data, losses and engines share.

Shape legend, used as name suffixes everywhere: B rows of a micro-batch, T positions of a row, S tokens of one
sample, N samples in a batch, K tasks, V vocabulary, H hidden width. `nll_BT` is a tensor of shape [B, T].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

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

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device`."""
        names = ("ids_BT", "target_BT", "task_BT", "sample_BT", "position_BT")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one optimizer step holds, the denominators of its losses; global once summed with `Engine.sum`.

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

    @classmethod
    def of(cls, batches: Iterable[Batch], tasks: int, stop: bool = False) -> StepCounts:
        """Counts the micro-batches of one rank; `tasks` is K."""
        import torch

        tokens_K = torch.zeros(tasks, dtype=torch.float64)
        samples_K = torch.zeros(tasks, dtype=torch.float64)
        micro_batches = processed = 0
        for batch in batches:
            trained_BT = batch.target_BT != IGNORE
            task_n = batch.task_BT[trained_BT].cpu()
            tokens_K += torch.bincount(task_n, minlength=tasks).double()
            # a sample has one task, so each of its trained tokens is the same (task, sample) pair
            pairs = torch.stack([task_n, batch.sample_BT[trained_BT].cpu()])
            samples_K += torch.bincount(torch.unique(pairs, dim=1)[0], minlength=tasks).double()
            micro_batches += int(task_n.numel() > 0)
            processed += int((batch.sample_BT >= 0).sum())
        return cls(tokens_K, samples_K, float(micro_batches), float(stop), float(processed))

    def tensor(self) -> torch.Tensor:
        """Returns the float64 vector [2K + 3] that one all-reduce sums over the ranks."""
        import torch

        tail = torch.tensor([self.micro_batches, self.stop, self.processed], dtype=torch.float64)
        return torch.cat([self.tokens_K.cpu(), self.samples_K.cpu(), tail])

    @classmethod
    def from_tensor(cls, vector: torch.Tensor) -> StepCounts:
        """Inverse of `tensor`; tokens_K and samples_K stay on the vector's device."""
        tasks = (vector.numel() - 3) // 2
        return cls(vector[:tasks], vector[tasks : 2 * tasks], *map(float, vector[-3:]))


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

    @property
    def total(self) -> int:
        """The global batch."""
        return self.per_device * self.accumulation * self.world
