"""The four static modes: weighted sums of token losses whose weights come from the counts of the whole step.

With N_k trained tokens and M_k samples of task k in the step (all ranks, all micro-batches), n_s trained
tokens of sample s, static task weights w and P the tasks present in the step, the weight of one token is

    token_mean        1 / sum_k N_k                            case1 of MFTCoder
    sample_mean       1 / (sum_k M_k * n_s)                    case2
    task_token_mean   w_k / sum_{j in P} w_j / N_k             case3
    task_sample_mean  w_k / sum_{j in P} w_j / (M_k * n_s)     case4

The original divided by the counts of each micro-batch instead, which let accumulation, ranks and the
micro-batch size change the objective, and with one task in a micro-batch cancelled the task weights
altogether.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mft.batch import IGNORE, Batch, StepCounts
from mft.loss.base import TaskLoss

if TYPE_CHECKING:
    import torch


def sample_slots(batch: Batch) -> torch.Tensor:
    """Returns int64 [B, T]: the number of the sample at trained tokens, B * T (a slot of its own)
    elsewhere."""
    import torch

    return torch.where(batch.target_BT != IGNORE, batch.sample_BT, batch.target_BT.numel())


def sample_tokens(slot_BT: torch.Tensor) -> torch.Tensor:
    """Returns int64 [B * T + 1]: trained tokens of each sample, by slot; the last slot is all that is not
    trained."""
    import torch

    # Sized by B * T, an upper bound of N, because reading N off the tensor would make the device wait for the
    # host.
    count_N = torch.zeros(slot_BT.numel() + 1, dtype=torch.int64, device=slot_BT.device)
    return count_N.scatter_add_(0, slot_BT.flatten(), torch.ones_like(slot_BT.flatten()))


def weighted_sum(
    nll_BT: torch.Tensor, batch: Batch, weight_K: torch.Tensor, by_sample: bool = False
) -> torch.Tensor:
    """Returns the sum of weight_K[task] * nll over trained tokens, each divided by its sample's n_s if
    `by_sample`.

    weight_K: float64 [K] on any device. The result has the dtype of `nll_BT`; it is 0 (with a graph) without
    trained tokens.
    """
    weight_BT = weight_K.to(nll_BT.dtype).to(nll_BT.device)[batch.task_BT.clamp(min=0)]
    weight_BT = weight_BT * (batch.target_BT != IGNORE)
    if by_sample:
        slot_BT = sample_slots(batch)
        weight_BT = weight_BT / sample_tokens(slot_BT)[slot_BT]
    return (nll_BT * weight_BT).sum()


def present_weights(weight_K: torch.Tensor, present_K: torch.Tensor) -> torch.Tensor:
    """Returns float64 [K] on the CPU: the weights of the tasks present, scaled to sum to 1, and 0 for the
    absent ones.

    All zeros where no task is present, or none with a weight above 0: such a step has the loss 0.
    """
    import torch

    weight_K, present_K = weight_K.double().cpu(), present_K.cpu()
    weight_K = torch.where(present_K, weight_K, torch.zeros_like(weight_K))
    if float(weight_K.max()) > 0:
        weight_K = weight_K / weight_K.max()  # first: the sum of the largest numbers there are would be inf
        return weight_K / weight_K.sum()
    return weight_K


def inverse(count_K: torch.Tensor) -> torch.Tensor:
    """Returns 1 / count as float64 on the CPU, 0 where the count is 0."""
    import torch

    count_K = count_K.double().cpu()
    return torch.where(count_K > 0, 1.0 / count_K.clamp(min=1.0), torch.zeros_like(count_K))


class Unweighted(TaskLoss):
    """A mode without task weights: says once that weights set by the user do nothing."""

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        if len(set(weights)) > 1:
            listed = ", ".join(
                f"task.{name}.weight={weight:g}" for name, weight in zip(names, weights, strict=True)
            )
            warnings.warn(
                f"loss={type(self).__name__} has no task weights; these do nothing: {listed}", stacklevel=2
            )


@dataclass
class TokenMean(Unweighted):
    """Every trained token of the step counts the same: sum of token losses / tokens."""

    public_name: ClassVar[str] = "token_mean"

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight_K = inverse(counts.tokens_K.sum()).expand(counts.tokens_K.numel())
        return weighted_sum(nll_BT, batch, weight_K)


@dataclass
class SampleMean(Unweighted):
    """Every sample of the step counts the same, however long: mean over samples of the sample's token
    mean."""

    public_name: ClassVar[str] = "sample_mean"
    by_sample: ClassVar[bool] = True

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight_K = inverse(counts.samples_K.sum()).expand(counts.samples_K.numel())
        return weighted_sum(nll_BT, batch, weight_K, by_sample=True)


@dataclass
class TaskTokenMean(TaskLoss):
    """Weighted mean over the tasks present in the step of each task's token mean (MFTCoder paper, Eq. 1)."""

    public_name: ClassVar[str] = "task_token_mean"

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight_K = present_weights(self.weight_K, counts.tokens_K > 0)
        return weighted_sum(nll_BT, batch, weight_K * inverse(counts.tokens_K))


@dataclass
class TaskSampleMean(TaskLoss):
    """Weighted mean over the tasks present in the step of each task's sample mean."""

    public_name: ClassVar[str] = "task_sample_mean"
    by_sample: ClassVar[bool] = True

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight_K = present_weights(self.weight_K, counts.samples_K > 0)
        return weighted_sum(nll_BT, batch, weight_K * inverse(counts.samples_K), by_sample=True)
