"""Intervals and corrections: equal to those of scipy and statsmodels, and as often right as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from mft.comparison.statistics import Covers, PairedRows, corrected, detectable, paired

NOISE = np.array([0.001, 0.0, -0.001])


def test_seeds_alone_give_the_paired_t_test() -> None:
    mine, other = np.array([1.31, 1.28, 1.35, 1.30]), np.array([1.25, 1.26, 1.30, 1.21])
    found, known = paired(mine - other), stats.ttest_rel(mine, other)
    interval = known.confidence_interval(0.95)
    assert found.p == pytest.approx(known.pvalue) and found.covers is Covers.seeds and found.seeds == 4
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.estimate == pytest.approx((mine - other).mean())


def test_what_seeds_share_is_no_error() -> None:
    """The spread of each setting is 100 times that of their difference."""
    seeds = np.array([-1.0, 0.0, 1.0])
    found = paired((seeds + 0.1 + [0.01, 0.0, -0.01]) - seeds)
    assert found.p < 0.005 and found.high - found.low < 0.06


def test_one_seed_gives_an_interval_over_rows_and_no_p() -> None:
    random = np.random.default_rng(0)
    tokens_N = random.integers(5, 50, 400).astype(float)
    loss_N = random.normal(0.02, 0.1, 400) * tokens_N
    estimate = loss_N.sum() / tokens_N.sum()
    found = paired([estimate], [PairedRows(loss_N[None], tokens_N)])
    assert found.covers is Covers.rows and math.isnan(found.p) and not found.told_apart
    # the delta method's standard error of a ratio of sums
    rest_N = loss_N - estimate * tokens_N
    error = rest_N.std(ddof=1) * math.sqrt(400) / tokens_N.sum()
    assert found.error == pytest.approx(error, rel=0.05)  # 2,000 draws: 1.6 % of the error, and its bias
    assert (found.low, found.high) == pytest.approx(
        (estimate - 1.96 * error, estimate + 1.96 * error), abs=0.2 * error
    )
    assert paired([estimate], [PairedRows(loss_N[None], tokens_N)]) == found, (
        "the same numbers, the same interval"
    )


def test_nothing_is_said_of_one_seed_without_rows() -> None:
    found = paired([0.1])
    assert found.covers is Covers.nothing and math.isnan(found.low) and not found.told_apart
    (only,) = corrected([found])
    assert math.isnan(only.adjusted_p)


def test_rows_that_differ_widen_the_interval_of_seeds() -> None:
    """Three seeds that agree on 20 rows say little of other rows."""
    random = np.random.default_rng(1)
    of_rows_N = random.normal(0.0, 1.0, 20)
    tokens_N, loss_nN = np.ones(20), np.stack([of_rows_N + 0.3] * 3)
    seeds = paired(loss_nN.mean(1) + NOISE)
    both = paired(loss_nN.mean(1) + NOISE, [PairedRows(loss_nN, tokens_N)])
    assert seeds.told_apart is False and seeds.p < 0.01 < both.p
    assert both.covers is Covers.both and both.error == pytest.approx(
        of_rows_N.std(ddof=1) / math.sqrt(20), rel=1e-3
    )
    assert both.freedom == pytest.approx(19, rel=0.01), "next to 20 rows, the seeds add nothing"


def test_holm_counts_all_comparisons_that_there_might_have_been() -> None:
    differences = [paired([1.0, 1.1, 1.2]), paired([0.1, 0.5, 0.9]), paired([0.2])]
    p = [d.p for d in differences[:2]]
    found = corrected(differences)
    assert [d.adjusted_p for d in found[:2]] == pytest.approx(multipletests(p, method="holm")[1])
    assert math.isnan(found[2].adjusted_p)
    wider = corrected(differences, family=6)
    assert [d.adjusted_p for d in wider[:2]] == pytest.approx(
        multipletests([*p, 1, 1, 1, 1], method="holm")[1][:2]
    )
    assert wider[0].detectable > found[0].detectable


def test_the_detectable_difference_has_the_power_it_says() -> None:
    found = paired([0.1, 0.5, 0.9, 0.6, 0.7])
    smallest = detectable(found, 0.05)
    sd = found.error * math.sqrt(5)
    assert TTestPower().power(smallest / sd, nobs=5, alpha=0.05) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize(("values", "apart"), [([0.0, 0.0], False), ([0.1, 0.1 + 1e-16], True)])
def test_differences_that_are_the_same_in_every_pair(values: list[float], apart: bool) -> None:
    (found,) = corrected([paired(values)])
    assert found.told_apart is apart and found.p in (0, 1) and found.low == pytest.approx(found.estimate)


@pytest.mark.parametrize(("seeds", "rows"), [(0.01, 0.0), (0.0, 0.1), (0.01, 0.1)])
def test_intervals_are_right_as_often_as_they_say(seeds: float, rows: float) -> None:
    """500 sweeps of a setting and another one, three seeds: python -m benchmarks.comparison runs 2,000."""
    from benchmarks.comparison import simulate

    found = simulate(sweeps=500, settings=2, seeds=3, of_seeds=seeds, of_rows=rows)
    # 2.6 standard errors of 500 draws around 95 %; of two equal settings 5 % are told apart by chance
    assert 0.925 <= found.coverage <= 0.975 and found.false_winners <= 0.075


@pytest.mark.parametrize(("seeds", "least"), [(1, 0.89), (3, 0.92), (5, 0.92)])
def test_few_rows_make_wide_intervals(seeds: int, least: float) -> None:
    """Of 2 * 5 rows each draw of the bootstrap, and the variance between rows, know little: 85 to 90 % were held."""
    from benchmarks.comparison import simulate

    found = simulate(sweeps=500, settings=2, seeds=seeds, of_seeds=0.001 * (seeds > 1), of_rows=0.1, rows=5)
    assert found.coverage >= least and found.false_winners <= 0.075
