"""CoBa, convergence balance (MFTCoder's second adaptive mode): as in the paper, and as its code computes it.

A probe gives the ratios L_i^val(t) / L_i^val(0). With alpha_i(t) the slope of task i's ratio over the last N
probes, alpha_max(t) = max_i alpha_i(t), and n the number of slopes remembered (at most N), the paper (its
equations from a secondary source) has

    RCS_i = softmax_i( K alpha_i / sum_j |alpha_j| )               large for tasks slower than the others
    ACS_i = softmax_i( -n alpha_i / sum_{window} |alpha_i(j)| )    large for tasks faster than their own past
    DF    = min( n softmax_j( -tau n alpha_max(j) / sum_{window} |alpha_max(j)| )[last], 1 )
    w     = DF RCS + (1 - DF) ACS,        w = 1/K before warm-up ends

The variant `mftcoder` is the public code: DF without the cap (up to 25 seen), a further softmax(K w), then
the floor w <- 0.9 w + 1/(10 K) when a weight falls below 1/(10 K), alpha_max = slope of the largest ratio,
missing probes skipped on the x axis, windows that count steps as if they were columns. It remembers every
probe, since those windows grow.

Shapes: `x_K` one value for each task, `x_k` for the tasks with a known slope alone, `x_p` one for each probe
remembered, the newest last. In the code alpha_i is `slope_K`, alpha_i(j) is `slope_pK`, alpha_max(j)
`largest_p`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mft.errors import ranged
from mft.loss.adaptive import Probing
from mft.loss.task_history import History, line_slope, softmax

if TYPE_CHECKING:
    import torch


class Variant(enum.Enum):
    """paper: the published equations with safeguards; mftcoder: the original code, to reproduce its runs."""

    paper = "paper"
    mftcoder = "mftcoder"


def scores(slope_K: np.ndarray, slope_pK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns RCS and ACS, float64 [K]; slope_pK: the window of slopes, NaN = unknown."""
    total = np.abs(slope_K).sum()  # 0: all tasks are flat, none is slower than another
    rcs_K = softmax(len(slope_K) * slope_K / total) if total > 0 else np.full(len(slope_K), 1 / len(slope_K))
    n_K = np.isfinite(slope_pK).sum(axis=0)
    past_K = np.nansum(np.abs(slope_pK), axis=0)
    # a task that has always been flat would be 0 / 0: its score is that of a slope of 0
    acs_K = softmax(np.where(past_K > 0, -n_K * slope_K / np.where(past_K > 0, past_K, 1.0), 0.0))
    return rcs_K, acs_K


def divergence_factor(largest_p: np.ndarray, tau: float) -> float:
    """Returns DF without its cap: below 1 when the largest slope is above those of the past."""
    n, total = len(largest_p), np.abs(largest_p).sum()
    scaled_p = largest_p / total if total > 0 else np.zeros_like(largest_p)
    return float(n * softmax(-tau * n * scaled_p)[-1])


@dataclass
class Coba(Probing):
    """Weights from how fast each task's validation loss falls.

    Safeguards of `paper`: a task without two probes keeps the weight 1/K and takes no part in the others'
    scores; slopes within rounding are 0; equal slopes give equal weights; losses that are not finite are
    dropped and counted.
    """

    public_name: ClassVar[str] = "coba"
    arrays: ClassVar[tuple[str, ...]] = ("first",)
    parts: ClassVar[tuple[str, ...]] = ("ratios", "slopes", "largest")

    variant: Variant = Variant.paper
    """The published equations with safeguards, or the original code's, to reproduce its runs."""
    warmup_steps: int = ranged(100, min=1)
    """Optimizer steps W before the weights move; a multiple of update_interval and at least 3 of them."""
    history_length: int = ranged(40, min=1)
    """Probes N that slopes look back on, at least W / update_interval; fewer react sooner."""
    tau: float = ranged(5.0, above=0)
    """Sharpness of the divergence factor DF, above 1 in the paper; larger slows diverging tasks sooner."""
    update_interval: int = ranged(5, min=1)
    """Optimizer steps u from one probe to the next; 1 in the original, larger costs less."""
    probe_samples: int = ranged(2, min=1)
    """Validation samples of each task that one probe reads, over all ranks; more is less noisy and dearer."""

    def __post_init__(self) -> None:
        self.variant = Variant(self.variant)
        super().__post_init__()

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().setup(names, weights)
        # the original's windows grow without end, see the module
        length = self.history_length if self.variant is Variant.paper else None
        self.first_K = np.full(len(self.names), np.nan)
        self.ratios, self.slopes = History(self.names, length), History(self.names, length)
        self.largest = History(("largest",), length)

    def set_initial_losses(self, valid_K: torch.Tensor) -> None:
        """Takes L_i^val(0), the unit of the ratios, as in the original; else it is the first probe."""
        self.first_K = self.finite(valid_K)

    def learn_valid(self, step: int, loss_K: np.ndarray) -> dict[str, float]:
        self.first_K = np.where(np.isnan(self.first_K), loss_K, self.first_K)
        update = step - 1
        if update == 0:  # as in the original, the probe before training is in no fit
            return self.logged()
        # ratios, so that tasks whose losses differ in size have comparable slopes
        self.ratios.append(update, loss_K / self.first_K)
        if not self.warm(update):
            return self.logged()
        return self._paper(update) if self.variant is Variant.paper else self._mftcoder(update)

    def _paper(self, update: int) -> dict[str, float]:
        slope_K = self.ratios.slopes()
        self.slopes.append(update, slope_K)
        known_K = np.isfinite(slope_K)
        if not known_K.any():
            return self.logged()
        self.largest.append(update, np.array([np.nanmax(slope_K)]))
        rcs_k, acs_k = scores(slope_K[known_K], self.slopes.array()[:, known_K])
        df = min(divergence_factor(self.largest.array()[:, 0], self.tau), 1.0)
        # the tasks with a slope divide their part of the total weight, the others keep 1/K each
        weight_K = np.full(len(slope_K), 1 / len(slope_K))
        weight_K[known_K] = (df * rcs_k + (1 - df) * acs_k) * known_K.mean()
        self.weigh(weight_K)
        rcs_K, acs_K = np.full((2, len(slope_K)), np.nan)
        rcs_K[known_K], acs_K[known_K] = rcs_k, acs_k
        return self.logged(slope=slope_K, rcs=rcs_K, acs=acs_K) | {"coba/df": df}

    def _mftcoder(self, update: int) -> dict[str, float]:
        step = update + self.update_interval  # the original's count when it computes weights from this probe
        start = max(0, step // self.update_interval - self.history_length)
        # the original marks an absent probe by 0, and cuts a table of probes by a number of steps
        window_pK = np.nan_to_num(self.ratios.array(), nan=0.0)[-(step - start) :]
        slope_K = np.array([self._packed_slope(ratio_p) for ratio_p in window_pK.T])
        self.slopes.append(update, slope_K)
        self.largest.append(update, np.array([self._packed_slope(window_pK.max(axis=1))]))
        # The first slope is that of the end of warm-up, yet `start`, which cuts them, is a number of probes.
        slope_pK = self.slopes.array()
        rcs_K, acs_K = scores(slope_K, slope_pK[min(start, len(slope_pK) - 1) :])
        df = divergence_factor(self.largest.array()[:, 0], self.tau)
        weight_K = softmax(len(slope_K) * (df * rcs_K + (1 - df) * acs_K))
        if weight_K.min() < 1 / (10 * len(slope_K)):
            weight_K = 0.9 * weight_K + 1 / (10 * len(slope_K))
        self.weigh(weight_K)
        return self.logged(slope=slope_K, rcs=rcs_K, acs=acs_K) | {"coba/df": df}

    @staticmethod
    def _packed_slope(value_p: np.ndarray) -> float:
        """Returns the slope of the values that are not 0 over 0, 1, 2, ...; 0 with fewer than two."""
        value_p = value_p[value_p != 0]
        return float(np.nan_to_num(line_slope(np.arange(len(value_p), dtype=np.float64), value_p), nan=0.0))
