"""Differences between two settings, paired by seed and by validation row, with what is known of their error.

Two things make a measured difference differ from the true one: the seeds that were run, and the validation
rows that were drawn. Both runs of a seed see the same order of data and start from the same weights, and all
runs are validated on the same rows, so differences are taken within pairs, which removes what pairs share.

Shapes: n paired seeds, N validation rows of a task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

CONFIDENCE = 0.95
"""Of every interval; one minus it is the level of every test."""

POWER = 0.8
"""Probability with which `Difference.detectable` would have been told from zero."""

ROUNDING = 1e-12
"""What rounding makes of equal numbers, as a part of them, or in nats."""

OUT_OF_REACH = 1000.0
"""Standard errors beyond which no difference counts as detectable: two seeds and a hundred comparisons."""

RESAMPLES = 2000
"""Of the bootstrap: the ends of an interval then vary by about 2 % of its width."""


class Covers(StrEnum):
    """What an interval takes into account."""

    nothing = "nothing"
    """One seed, and the losses of single rows are not known."""
    rows = "rows"
    """The choice of validation rows. One seed: how another seed would do is not known."""
    seeds = "seeds"
    """The choice of seeds, on these validation rows."""
    both = "seeds and rows"


@dataclass(frozen=True)
class Difference:
    """A setting minus the one it is compared with, in units of the metric. NaN: not known."""

    estimate: float
    low: float = math.nan
    """Lower end of its 95 % interval."""
    high: float = math.nan
    p: float = math.nan
    """Two-sided, of no difference; NaN with one seed."""
    adjusted_p: float = math.nan
    """The same after Holm's correction for the number of comparisons."""
    detectable: float = math.nan
    """Smallest true difference that `POWER` of such comparisons would tell from 0, after the correction."""
    seeds: int = 1
    """Paired seeds."""
    rows: int = 0
    """Paired validation rows, 0 where their losses are not known."""
    covers: Covers = Covers.nothing
    error: float = math.nan
    """Standard error of the estimate."""
    freedom: float = math.nan
    """Degrees of freedom of the error."""
    other_rows: bool = False
    """Whether the two were validated on different rows. Those in common decide; with none (`rows` is 0) the
    difference is also that of the rows."""
    other_tokens: bool = False
    """Whether the two have different tokens in the same rows, as of another tokenizer."""

    @property
    def told_apart(self) -> bool:
        """Whether it is told from 0 after the correction; never with one seed or without a row in common."""
        return self.adjusted_p < 1 - CONFIDENCE and not (self.other_rows and self.rows == 0)


@dataclass(frozen=True)
class PairedRows:
    """The rows of one task that both runs of every pair were validated on."""

    loss_nN: np.ndarray
    """Loss sum of each row, weighted by the task's part in the metric: one setting minus the other."""
    tokens_N: np.ndarray
    """Trained tokens of each row. The difference of a pair is the sum over tasks of losses over tokens."""
    complete: bool = True
    """Whether no run was validated on other rows of the task as well."""

    @property
    def difference_n(self) -> np.ndarray:
        """The task's part in the difference of each pair."""
        return self.loss_nN.sum(axis=1) / self.tokens_N.sum()


def paired(difference_n: Sequence[float], tasks: Sequence[PairedRows] = ()) -> Difference:
    """Returns the difference of two settings from those of their paired seeds.

    tasks: () where the losses of single rows are not known. Where runs were validated on different rows,
    those that they have in common decide, not `difference_n`. A task with one row is of no use.

    From two seeds on it is a t-interval of the paired mean. Where rows are known, seeds and rows are two
    crossed random factors: the variance of the mean is that of the seeds plus that of the rows minus that of
    their interaction, which both contain (Clark 1973, "The language-as-fixed-effect fallacy"). With one seed
    it is a bootstrap over rows, within tasks.
    """
    difference = np.asarray(difference_n, np.float64)
    if not all(task.complete for task in tasks):
        difference = np.sum([task.difference_n for task in tasks], axis=0)
    n, estimate = len(difference), float(np.mean(difference))
    rows = sum(len(task.tokens_N) for task in tasks)
    tasks = tasks if all(len(task.tokens_N) > 1 for task in tasks) else ()
    if n == 1:
        if not tasks:
            return Difference(estimate, rows=rows)
        low, high, error = _bootstrap(tasks)
        return Difference(estimate, low, high, rows=rows, covers=Covers.rows, error=error)
    of_seeds = float(np.var(difference, ddof=1)) / n
    variance, freedom, covers = of_seeds, float(n - 1), Covers.seeds
    if tasks:
        variance, freedom = _crossed(of_seeds, n, tasks)
        covers = Covers.both
    known = Difference(
        estimate, seeds=n, rows=rows, covers=covers, error=math.sqrt(variance), freedom=freedom
    )
    return _tested(known)


def _tested(known: Difference) -> Difference:
    """Returns a difference with interval and p by its error and degrees of freedom."""
    from scipy.stats import t

    if known.error <= ROUNDING * abs(known.estimate):  # the same in every pair: the limit of the test
        p = 0.0 if abs(known.estimate) > ROUNDING else 1.0
        return replace(known, low=known.estimate, high=known.estimate, p=p)
    reach = float(t.isf((1 - CONFIDENCE) / 2, known.freedom)) * known.error
    p = float(2 * t.sf(abs(known.estimate) / known.error, known.freedom))
    return replace(known, low=known.estimate - reach, high=known.estimate + reach, p=p)


def _crossed(of_seeds: float, n: int, tasks: Sequence[PairedRows]) -> tuple[float, float]:
    """Returns variance and degrees of freedom of a mean over n seeds and over the rows of all tasks.

    of_seeds: the variance of the mean as the seeds show it.
    """
    of_rows, freedom_of_rows = _of_rows(tasks)
    of_both = 0.0
    for task in tasks:
        influence_nN = _influence(task)
        count = influence_nN.shape[1]
        row_N = influence_nN.mean(axis=0)
        of_both += float(np.sum((influence_nN - row_N) ** 2)) / ((n - 1) * (count - 1)) / (n * count)
    # The estimate may be smaller than one of its parts, which only chance can bring about.
    variance = max(of_seeds + of_rows - of_both, of_seeds, of_rows)
    if of_seeds + of_rows == 0:
        return variance, math.inf
    # What makes the variance uncertain are mostly the few seeds: the smaller their part, the more is known of
    # it. Satterthwaite's approximation divides by the square of the part, which is itself uncertain: with
    # three seeds its intervals hold the truth in 92 to 96 % of sweeps, these in 94 to 96 %. With two seeds
    # the part is hardly known, and its root keeps to 93 to 98 %, where Satterthwaite falls to 87 %.
    part = of_seeds / (of_seeds + of_rows)
    of_few = (part**0.5 if n == 2 else part) / (n - 1) + (1 - part) / freedom_of_rows
    return variance, 1 / of_few


def _of_rows(tasks: Sequence[PairedRows]) -> tuple[float, float]:
    """Returns the variance over rows of a mean over seeds and its degrees of freedom (Satterthwaite)."""
    counts = [len(task.tokens_N) for task in tasks]
    parts = [
        float(np.var(_influence(task).mean(axis=0), ddof=1)) / count
        for task, count in zip(tasks, counts, strict=True)
    ]
    uncertain = sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    return sum(parts), sum(parts) ** 2 / uncertain if uncertain > 0 else math.inf


def _influence(task: PairedRows) -> np.ndarray:
    """Returns by how much each row moves the task's part of the difference, [n, N], of mean zero.

    The part is a ratio of sums; its first derivative by a row's weight (the delta method).
    """
    tokens, count = float(task.tokens_N.sum()), len(task.tokens_N)
    return (task.loss_nN - task.difference_n[:, None] * task.tokens_N) * (count / tokens)


def _bootstrap(tasks: Sequence[PairedRows]) -> tuple[float, float, float]:
    """Returns the interval of one pair's difference over draws of rows within each task, and its error."""
    from scipy.stats import bootstrap, norm, t

    def statistic(*numbers: np.ndarray, axis: int = -1) -> np.ndarray:
        parts = [
            task.loss_nN[0][drawn].sum(axis=axis) / task.tokens_N[drawn].sum(axis=axis)
            for task, drawn in zip(tasks, numbers, strict=True)
        ]
        return np.sum(parts, axis=0)

    numbers = [np.arange(len(task.tokens_N)) for task in tasks]
    held = sum(len(task.tokens_N) for task in tasks)
    # Draws from few rows vary too little. The level that makes up for it in a mean (Hesterberg 2015, "What
    # Teachers Should Know About the Bootstrap"): 95.4 % of 100 rows, 96.8 % of 20.
    _, freedom = _of_rows(tasks)
    reach = float(t.isf((1 - CONFIDENCE) / 2, freedom)) * math.sqrt(1 + 1 / freedom)
    result = bootstrap(
        numbers,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // held),  # draws held in memory at once
        vectorized=True,
        method="percentile",
        confidence_level=1 - 2 * float(norm.sf(reach)),
        rng=np.random.default_rng(0),  # the same numbers give the same interval
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high), float(result.standard_error)


def corrected(differences: Sequence[Difference], family: int = 0) -> list[Difference]:
    """Returns the differences with p adjusted by Holm's step-down correction, and what could have been told.

    family: how many comparisons there might have been, 0 for those at hand. Of a larger family the others
    count as the largest p, which can only make the adjusted ones larger. Those without p are no part of it.
    `detectable` is at the level of the first, strictest step.
    """
    tested = [i for i, difference in enumerate(differences) if not math.isnan(difference.p)]
    count = max(family, len(tested))
    result, largest = list(differences), 0.0
    # Holm (1979). statsmodels' multipletests gives the same and collects garbage at every call: 85 ms.
    for step, i in enumerate(sorted(tested, key=lambda i: differences[i].p)):
        largest = max(largest, min(1.0, (count - step) * differences[i].p))
        smallest = detectable(differences[i], (1 - CONFIDENCE) / count)
        result[i] = replace(differences[i], adjusted_p=largest, detectable=smallest)
    return result


def detectable(difference: Difference, level: float) -> float:
    """Returns the true difference that a two-sided t-test of this error tells from zero with `POWER`.

    NaN where there is none within `OUT_OF_REACH` standard errors.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    if not difference.error > 0:
        return math.nan
    threshold = float(t.isf(level / 2, difference.freedom))
    if threshold > OUT_OF_REACH:
        return math.nan

    def missing(shift: float) -> float:
        return float(nct.sf(threshold, difference.freedom, shift)) - POWER

    return float(brentq(missing, 0.0, 20 * threshold + 20)) * difference.error
