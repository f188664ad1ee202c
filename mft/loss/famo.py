"""FAMO, fast adaptive multitask optimization (Liu et al. 2023), as in the authors' code.

With z = softmax(xi) over the tasks present, D_i = L_i - b_i + eps and c = sum_i z_i / D_i (taken as a
constant),

    objective = sum_i z_i log(D_i) / c,   so dL/dL_i = z_i / (c D_i), coefficients that sum to 1
    after the update, on the same batch: delta_i = log D_i(old) - log D_i(new),  gradient of xi = J_softmax(xi)^T delta

and one step of Adam on xi (the paper writes a plain gradient step; the authors' code has Adam with coupled
weight decay). `source=valid` takes delta from successive validation probes instead, our practical form of
MFTCoder's Eq. 4 (from memory of that paper, not in its public code): noisier, since two probes read different
samples, and without the repeated forward pass.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mft.batch import Batch, StepCounts
from mft.errors import check_ranges, ranged
from mft.loss.adaptive import Adam, Adaptive, arrays, by_task, check_probes, chosen, softmax
from mft.loss.base import task_sums
from mft.loss.focal import values_of
from mft.loss.means import inverse, weighted_sum

if TYPE_CHECKING:
    import torch

EPS = 1e-8


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
        self.source = chosen(Source, self.source, "loss.source")
        check_ranges(self, "loss")

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        if len(set(weights)) > 1:
            warnings.warn(
                "loss=famo starts from equal task weights; task.<name>.weight does nothing", stacklevel=2
            )
        super().setup(names, [1.0] * len(names))
        self.min_loss_K = values_of(
            "loss.min_loss", self.names, self.min_loss, self.min_loss_by_task or {}
        ).numpy()
        self.xi_K = np.zeros(len(self.names))
        self.before_K = np.full(len(self.names), np.nan)
        self.adam = Adam(len(self.names), self.lr, self.weight_decay)

    @property
    def needs_validation(self) -> bool:
        return self.source is Source.valid

    def check_schedule(self, steps: int, valid_samples: Sequence[int]) -> None:
        if self.source is Source.valid:
            check_probes("famo with loss.source=valid", self.names, valid_samples)

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
        """Returns D: how far each loss is above its lower bound, at least eps."""
        above_K: np.ndarray = np.maximum(loss_K - self.min_loss_K + EPS, EPS)
        return above_K

    def coefficients(self, loss_K: np.ndarray) -> tuple[np.ndarray, float]:
        """Returns dL/dL_i (float64 [K], 0 for tasks whose loss is NaN) and the value of the objective."""
        here_K = np.isfinite(loss_K)
        slope_K = np.zeros(len(loss_K))
        if not here_K.any():
            return slope_K, 0.0
        z_k, distance_k = softmax(self.xi_K[here_K]), self.distance(loss_K)[here_K]
        c = (z_k / distance_k).sum()
        slope_K[here_K] = z_k / (c * distance_k)
        return slope_K, float((z_k * np.log(distance_k)).sum() / c)

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The linearisation at the step's losses; each token carries its part of what makes the values add
        up."""
        import torch

        assert statistics is not None, "famo needs the statistics of the step"
        sum_K, count_K = statistics.double().cpu().unbind(1)
        loss_K = torch.where(count_K > 0, sum_K / count_K.clamp(min=1), torch.nan).numpy()
        slope_K, objective = self.coefficients(loss_K)
        rest = objective - float((slope_K * np.nan_to_num(loss_K, nan=0.0)).sum())
        linear = weighted_sum(nll_BT, batch, torch.from_numpy(slope_K) * inverse(counts.tokens_K))
        every_K = inverse(counts.tokens_K.sum()).expand(len(slope_K))
        return linear + rest * weighted_sum(torch.ones_like(nll_BT), batch, every_K)

    def learn_train(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        if np.isfinite(loss_K).any():
            self.weigh(self.coefficients(loss_K)[0])
        if self.source is Source.train:
            self.before_K = loss_K
        return self.logged(z=softmax(self.xi_K))

    def learn_repeat(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        if self.source is Source.train:
            self.progress(loss_K)
        return {}

    def learn_valid(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        if self.source is Source.valid:
            self.progress(loss_K)
        return {}

    def progress(self, after_K: np.ndarray) -> None:
        """One step of Adam on xi from the losses before and after an update, for the tasks that have both."""
        here_K = np.isfinite(self.before_K) & np.isfinite(after_K)
        if here_K.sum() > 1:
            delta_K = np.log(self.distance(self.before_K)) - np.log(self.distance(after_K))
            z_k = softmax(self.xi_K[here_K])
            gradient_K = np.zeros(len(here_K))
            gradient_K[here_K] = z_k * (delta_K[here_K] - z_k @ delta_K[here_K])
            self.xi_K = self.adam.stepped(self.xi_K, gradient_K, here_K)
        if self.source is Source.valid:
            self.before_K = np.where(np.isfinite(after_K), after_K, self.before_K)

    def state_dict(self) -> dict[str, Any]:
        own = by_task(self.names, xi=self.xi_K, before=self.before_K) | {
            "adam": self.adam.state_dict(self.names)
        }
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.xi_K, self.before_K = arrays(state, self.names, "xi", "before")
        self.adam.load_state_dict(state["adam"], self.names)
