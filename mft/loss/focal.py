"""Focal losses of the MFTCoder paper (section 3.5, Eq. 2 and 3).

The equations are given from memory of the paper: no public revision of its code holds them. With P_ij the
mean probability and Q_ij the mean log-probability of the trained tokens of sample j of task i, and M_i
samples of task i in the step,

    sample level (Eq. 2)   L = sum_ij -alpha_i (1 - P_ij)^gamma_i Q_ij / sum_i M_i
    task level   (Eq. 3)   P_i = sum_j P_ij / M_i,  Q_i = sum_j Q_ij / M_i,
                           L = sum_i v_i * -alpha_i (1 - P_i)^gamma_i Q_i

where v_i = 1 / (tasks present) in the paper; here v are the static task weights, normalised over the tasks
present, which is the same when they are equal. The factor (1 - P)^gamma is differentiated, as in Lin et al.
2017. P is a mean of token probabilities, not the exponential of the mean log-probability. gamma = 0 with
alpha = 1 is sample_mean and task_sample_mean.

Shapes, as in `loss.means`: `x_m` one value for each position, flattened, `x_n` one for each sample slot; P_n
and Q_n are the P_ij and Q_ij of a micro-batch, P_K and Q_K the P_i and Q_i of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mft.batch import IGNORE, Batch, StepCounts
from mft.errors import check_ranges, ranged
from mft.hardware import send
from mft.loss.base import TaskLoss
from mft.loss.means import inverse, present_weights, sample_slots, sample_tokens

if TYPE_CHECKING:
    import torch

CERTAIN = 1e-6
"""Smallest 1 - P: below it float32 has no digits left, and for gamma < 1 the derivative would be infinite."""


def values_of(names: Sequence[str], default: float, values: Mapping[str, float] | None) -> torch.Tensor:
    """Returns float64 [K]: the value of each task, `default` where `values` has none."""
    import torch

    return torch.tensor([float((values or {}).get(name, default)) for name in names], dtype=torch.float64)


def sample_means(nll_BT: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns P_n, Q_n (dtype of nll, differentiable) and the int64 task_n of each sample slot.

    Slots without a trained token have P = Q = 0 (and task 0), so that they add nothing to any sum.
    """
    trained_BT = batch.target_BT != IGNORE
    slot_BT = sample_slots(batch)
    slot_m, size = slot_BT.flatten(), slot_BT.numel() + 1
    tokens_n = sample_tokens(slot_BT).clamp(min=1)  # of slots without a sample; their sums are 0
    zero_n = nll_BT.new_zeros(size)
    log_m = (-nll_BT * trained_BT).flatten()
    P_n = zero_n.scatter_add(0, slot_m, log_m.exp() * trained_BT.flatten()) / tokens_n
    Q_n = zero_n.scatter_add(0, slot_m, log_m) / tokens_n
    task_n = slot_m.new_zeros(size).scatter_(0, slot_m, (batch.task_BT * trained_BT).flatten())
    return P_n, Q_n, task_n


@dataclass
class Focal(TaskLoss):
    """The settings of both focal losses: an exponent and a factor for each task."""

    by_sample: ClassVar[bool] = True

    gamma: float = ranged(2.0, min=0)
    """Exponent of (1 - P); 0 switches the focus off, 2 is the value of Lin et al."""
    alpha: float = ranged(1.0, min=0)
    """Factor of every task; alone it only scales the loss."""
    gamma_by_task: dict[str, float] | None = None
    """Exponents of single tasks; other tasks take gamma."""
    alpha_by_task: dict[str, float] | None = None
    """Factors of single tasks; other tasks take alpha."""

    def __post_init__(self) -> None:
        check_ranges(self, "loss")

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        self.gamma_K = values_of(self.names, self.gamma, self.gamma_by_task)
        self.alpha_K = values_of(self.names, self.alpha, self.alpha_by_task)


@dataclass
class SampleFocal(Focal):
    """Samples that the model already predicts well count less (Eq. 2, from memory of the paper)."""

    public_name: ClassVar[str] = "sample_focal"
    takes_weights: ClassVar[bool] = False

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        P_n, Q_n, task_n = sample_means(nll_BT, batch)
        gamma_n = send(self.gamma_K.to(nll_BT.dtype), nll_BT.device)[task_n]
        scale_K = self.alpha_K * inverse(counts.samples_K.sum())
        scale_n = send(scale_K.to(nll_BT.dtype), nll_BT.device)[task_n]
        return -(scale_n * (1 - P_n).clamp(min=CERTAIN) ** gamma_n * Q_n).sum()


@dataclass
class TaskFocal(Focal):
    """Tasks that the model already predicts well count less (Eq. 3, from memory of the paper).

    P_i and Q_i are those of the whole step over all ranks. The objective is not linear in them, so they must
    be known before the first backward pass: `statistics` costs one more forward pass without gradient. The
    statistics of the last step would be free but belong to other samples, and the gradient would no longer be
    that of any objective.

    With p_i = sum_j P_ij and q_i = sum_j Q_ij of the step and p'_i, q'_i those of one micro-batch (they add
    up to p, q), the share is the linearisation at the step's statistics

        share = sum_i dL/dq_i * q'_i + dL/dp_i * (p'_i - constant p'_i)
        dL/dq_i = -v_i alpha_i (1 - P_i)^gamma_i / M_i
        dL/dp_i = v_i alpha_i gamma_i (1 - P_i)^(gamma_i - 1) Q_i / M_i

    whose gradient summed over micro-batches is that of L by the chain rule. Its value adds up to L as well,
    since L is linear in q for fixed p and the second term has the value 0.
    """

    public_name: ClassVar[str] = "task_focal"
    needs_statistics: ClassVar[bool] = True

    def statistics(self, nll_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns float64 [K, 2]: sum_j P_ij and sum_j Q_ij."""
        # float64, since these sums over many ranks and micro-batches set the slopes of the whole step
        P_n, Q_n, task_n = sample_means(nll_BT.detach().double(), batch)
        sums_K2 = P_n.new_zeros(len(self.names), 2)
        for column, value_n in enumerate((P_n, Q_n)):
            sums_K2[:, column].index_add_(0, task_n, value_n)
        return sums_K2

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert statistics is not None, "task_focal needs the statistics of the step"
        # P_i, Q_i and their slopes dL/dq_i, dL/dp_i: K numbers, on the CPU in float64
        present_K, per_sample_K = counts.samples_K > 0, inverse(counts.samples_K)
        P_K, Q_K = (statistics * per_sample_K[:, None]).unbind(1)
        scale_K = present_weights(self.weight_K, present_K) * self.alpha_K * per_sample_K
        miss_K = (1 - P_K).clamp(min=CERTAIN)
        slope_q_K = -scale_K * miss_K**self.gamma_K
        slope_p_K = scale_K * self.gamma_K * miss_K ** (self.gamma_K - 1) * Q_K
        # where the clamp holds, the objective does not depend on P
        slope_p_K = slope_p_K * (1 - P_K > CERTAIN)
        P_n, Q_n, task_n = sample_means(nll_BT, batch)
        slope_q_n = send(slope_q_K.to(nll_BT.dtype), nll_BT.device)[task_n]
        slope_p_n = send(slope_p_K.to(nll_BT.dtype), nll_BT.device)[task_n]
        # P - P.detach() is 0 with the gradient of P: the values of the shares add up to L, too
        return (slope_q_n * Q_n + slope_p_n * (P_n - P_n.detach())).sum()
