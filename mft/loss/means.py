"""The four static modes: weighted sums of token losses whose weights come from the counts of the whole step.

With N_k trained tokens and M_k samples of task k in the step (all ranks, all micro-batches), n_s trained
tokens of sample s, static task weights w and P the tasks present in the step, the weight of one token is

    token_mean        1 / sum_k N_k                            case1 of MFTCoder
    sample_mean       1 / (sum_k M_k * n_s)                    case2
    task_token_mean   w_k / sum_{j in P} w_j / N_k             case3
    task_sample_mean  w_k / sum_{j in P} w_j / (M_k * n_s)     case4

Shapes: `x_m` one value for each of the B * T positions, flattened; `x_n` one for each sample slot, of which
there are B * T, an upper bound of the N samples, and one more for all that is not trained.

The original divided by the counts of each micro-batch instead, which let accumulation, ranks and the
micro-batch size change the objective, and with one task in a micro-batch cancelled the task weights
altogether.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mft.batch import IGNORE, Batch, StepCounts
from mft.hardware import send
from mft.loss.base import TaskLoss

if TYPE_CHECKING:
    import torch


def sample_slots(batch: Batch) -> torch.Tensor:
    """Returns int64 [B, T]: the sample's number at trained tokens, B * T (the last slot) elsewhere."""
    return batch.sample_BT.masked_fill(batch.target_BT == IGNORE, batch.target_BT.numel())


def sample_tokens(slot_BT: torch.Tensor) -> torch.Tensor:
    """Returns int64 [n]: trained tokens of each sample slot."""
    # Sized by B * T, so that no value of the device has to be read.
    slot_m = slot_BT.flatten()
    count_n = slot_m.new_zeros(slot_m.numel() + 1)
    return count_n.scatter_add_(0, slot_m, slot_m.new_ones(slot_m.numel()))


def weighted_sum(
    nll_BT: torch.Tensor, batch: Batch, weight_K: torch.Tensor, by_sample: bool = False
) -> torch.Tensor:
    """Returns the sum of weight_K[task] * nll over trained tokens, each over its n_s if `by_sample`.

    weight_K: float64 [K] on the CPU. The result is a scalar of nll's dtype, 0 (with a graph) without
    trained tokens.
    """
    # padding has the task -1; any index will do there, since the next line gives it the weight 0
    weight_BT = send(weight_K.to(nll_BT.dtype), nll_BT.device)[batch.task_BT.clamp(min=0)]
    weight_BT = weight_BT * (batch.target_BT != IGNORE)
    if by_sample:
        slot_BT = sample_slots(batch)
        weight_BT = weight_BT / sample_tokens(slot_BT)[slot_BT]
    return (nll_BT * weight_BT).sum()


def present_weights(weight_K: torch.Tensor, present_K: torch.Tensor) -> torch.Tensor:
    """Returns float64 [K]: weights of the tasks present, scaled to sum to 1; 0 for others.

    All zeros where no task is present, or none with a weight above 0: such a step has the loss 0.
    """
    weight_K = weight_K.double() * present_K
    if float(weight_K.max()) > 0:
        weight_K = weight_K / weight_K.max()  # first: the sum of the largest numbers there are would be inf
        return weight_K / weight_K.sum()
    return weight_K


def inverse(count_K: torch.Tensor) -> torch.Tensor:
    """Returns 1 / count as float64, 0 where the count is 0."""
    count_K = count_K.double()
    return (count_K > 0) / count_K.clamp(min=1.0)


class Mean(TaskLoss):
    """A weighted sum of token losses that is linear in them, so that it needs the step's counts alone."""

    @abstractmethod
    def unit_weights(self, counts: StepCounts) -> torch.Tensor:
        """Returns float64 [K]: the weight of a token of each task, or of a sample if `by_sample`."""

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        return weighted_sum(nll_BT, batch, self.unit_weights(counts), self.by_sample)


@dataclass
class TokenMean(Mean):
    """Every trained token of the step counts the same: sum of token losses / tokens."""

    public_name: ClassVar[str] = "token_mean"
    takes_weights: ClassVar[bool] = False

    def unit_weights(self, counts: StepCounts) -> torch.Tensor:
        return inverse(counts.tokens_K.sum()).expand(counts.tokens_K.numel())


@dataclass
class SampleMean(Mean):
    """Every sample of the step counts the same, however long: mean of the samples' token means."""

    public_name: ClassVar[str] = "sample_mean"
    takes_weights: ClassVar[bool] = False
    by_sample: ClassVar[bool] = True

    def unit_weights(self, counts: StepCounts) -> torch.Tensor:
        return inverse(counts.samples_K.sum()).expand(counts.samples_K.numel())


@dataclass
class TaskTokenMean(Mean):
    """Weighted mean over the tasks present in the step of each task's token mean (MFTCoder paper, Eq. 1)."""

    public_name: ClassVar[str] = "task_token_mean"

    def unit_weights(self, counts: StepCounts) -> torch.Tensor:
        return present_weights(self.weight_K, counts.tokens_K > 0) * inverse(counts.tokens_K)


@dataclass
class TaskSampleMean(Mean):
    """Weighted mean over the tasks present in the step of each task's sample mean."""

    public_name: ClassVar[str] = "task_sample_mean"
    by_sample: ClassVar[bool] = True

    def unit_weights(self, counts: StepCounts) -> torch.Tensor:
        return present_weights(self.weight_K, counts.samples_K > 0) * inverse(counts.samples_K)
