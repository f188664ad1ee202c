"""FAMO, fast adaptive multitask optimization (Liu et al. 2023), as in the authors' code.

With z = softmax(xi) over the tasks present, D_i = L_i - b_i + eps and c = sum_i z_i / D_i (taken as a
constant),

    objective = sum_i z_i log(D_i) / c,   so dL/dL_i = z_i / (c D_i), coefficients that sum to 1
    delta_i = log D_i(old) - log D_i(new)     after the update, on the same batch
    gradient of xi = J_softmax(xi)^T delta

and one step of Adam on xi (the paper writes a plain gradient step; the authors' code has Adam with coupled
weight decay). `source=valid` takes delta from successive validation probes instead, our practical form of
MFTCoder's Eq. 4 (from memory of that paper, not in its public code): noisier, since two probes read different
samples, and without the repeated forward pass.

Shapes: `x_K` one value for each task, `x_k` for the tasks present alone. In the code b is `min_loss_K`, D is
`D_k` and dL/dL_i is `slope_K`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mft.batch import Batch, StepCounts
from mft.errors import ranged
from mft.loss.adaptive import Adaptive
from mft.loss.base import task_sums
from mft.loss.focal import values_of
from mft.loss.means import inverse, weighted_sum
from mft.loss.task_history import Adam, softmax

if TYPE_CHECKING:
    import torch

EPS = 1e-8
"""The eps of D_i, the authors' value: a loss at its lower bound keeps a finite logarithm."""


class Source(enum.Enum):
    """train: the step's own batch, forwarded again after the update; valid: successive validation probes."""

    train = "train"
    valid = "valid"


@dataclass
class Famo(Adaptive):
    """Equal relative progress of all tasks.

    The coefficients depend on the task losses of the whole step, hence `statistics`: one more forward pass
    without gradient.
    """

    public_name: ClassVar[str] = "famo"
    takes_weights: ClassVar[bool] = False
    arrays: ClassVar[tuple[str, ...]] = ("xi", "before")
    parts: ClassVar[tuple[str, ...]] = ("adam",)
    needs_statistics: ClassVar[bool] = True

    source: Source = Source.train
    """Where progress is seen: the step's own batch (official), or successive validation probes."""
    lr: float = ranged(0.025, above=0)
    """Learning rate of the weights' logits (Adam); 0.025 in the paper."""
    weight_decay: float = ranged(0.01, min=0)
    """Pull of the logits towards equal weights (coupled L2)."""
    min_loss: float = ranged(0.0, min=0)
    """The loss a task cannot get below, in nats per token; progress is measured in log(loss - min_loss)."""
    min_loss_by_task: dict[str, float] | None = None
    """The same for single tasks; other tasks take min_loss."""
    probe_samples: int = ranged(2, min=1)
    """Validation samples of each task that one probe reads, over all ranks (source=valid)."""

    def __post_init__(self) -> None:
        self.source = Source(self.source)
        super().__post_init__()

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        self.min_loss_K = values_of(self.names, self.min_loss, self.min_loss_by_task).numpy()
        self.xi_K = np.zeros(len(self.names))
        self.before_K = np.full(len(self.names), np.nan)
        self.adam = Adam(self.names, self.lr, self.weight_decay)

    @property
    def needs_validation(self) -> bool:
        return self.source is Source.valid

    def check_schedule(self, steps: int, valid_samples: Sequence[int]) -> None:
        if self.source is Source.valid:
            self.check_probes(valid_samples)

    def wants_probe(self, step: int) -> bool:
        return self.source is Source.valid

    def wants_train(self, step: int) -> bool:
        return True

    def wants_repeat(self, step: int) -> bool:
        return self.source is Source.train

    def statistics(self, nll_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns float64 [K, 2]: the sum of token losses and the trained tokens of each task."""
        return task_sums(nll_BT, batch, len(self.names)).T

    def distance(self, loss_K: np.ndarray) -> np.ndarray:
        """Returns D_K: how far each loss is above its lower bound, at least eps."""
        return np.asarray(np.maximum(loss_K - self.min_loss_K + EPS, EPS))

    def coefficients(self, loss_K: np.ndarray) -> tuple[np.ndarray, float]:
        """Returns dL/dL_i (float64 [K], 0 for tasks whose loss is NaN) and the value of the objective."""
        present_K = np.isfinite(loss_K)
        slope_K = np.zeros(len(loss_K))
        if not present_K.any():
            return slope_K, 0.0
        z_k, D_k = softmax(self.xi_K[present_K]), self.distance(loss_K)[present_K]
        c = (z_k / D_k).sum()
        slope_K[present_K] = z_k / (c * D_k)
        return slope_K, float((z_k * np.log(D_k)).sum() / c)

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the linearisation at the step's losses: sum_i dL/dL_i * (micro-batch's part of L_i) + rest.

        The constant rest, spread over the tokens, makes the values of the shares add up to the objective; it
        has no gradient.
        """
        import torch

        assert statistics is not None, "famo needs the statistics of the step"
        sum_K, count_K = statistics.unbind(1)
        loss_K = torch.where(count_K > 0, sum_K / count_K.clamp(min=1), torch.nan).numpy()
        slope_K, objective = self.coefficients(loss_K)
        rest = objective - float((slope_K * np.nan_to_num(loss_K, nan=0.0)).sum())
        linear = weighted_sum(nll_BT, batch, torch.from_numpy(slope_K) * inverse(counts.tokens_K))
        per_token_K = inverse(counts.tokens_K.sum()).expand(len(slope_K))
        return linear + rest * weighted_sum(torch.ones_like(nll_BT), batch, per_token_K)

    def learn_train(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        # weight_K is for the log only: `share` takes its coefficients from the step's statistics
        if np.isfinite(loss_K).any():
            self.weigh(self.coefficients(loss_K)[0])
        if self.source is Source.train:
            self.before_K = loss_K
        return self.logged(z=softmax(self.xi_K))

    def learn_repeat(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        if self.source is Source.train:
            self.step_xi(loss_K)
        return {}

    def learn_valid(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        if self.source is Source.valid:
            self.step_xi(loss_K)
            self.before_K = np.where(np.isfinite(loss_K), loss_K, self.before_K)
        return {}

    def step_xi(self, after_K: np.ndarray) -> None:
        """One step of Adam on xi from the losses before and after an update, for the tasks that have both."""
        both_K = np.isfinite(self.before_K) & np.isfinite(after_K)
        if both_K.sum() < 2:  # the softmax of a single task is 1 whatever its logit
            return
        delta_K = np.log(self.distance(self.before_K)) - np.log(self.distance(after_K))
        z_k = softmax(self.xi_K[both_K])
        gradient_K = np.zeros(len(both_K))
        # J_softmax^T delta = z * (delta - z . delta): a task that fell more than the mean gets less weight
        gradient_K[both_K] = z_k * (delta_K[both_K] - z_k @ delta_K[both_K])
        self.xi_K = self.adam.stepped(self.xi_K, gradient_K, both_K)
