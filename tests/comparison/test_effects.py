"""Main effects and shares of variance, against numbers that are known beforehand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from mft.comparison.compare import compare
from mft.comparison.effects import effects
from tests.comparison.made_runs import run


def test_shares_and_effects_of_a_grid_are_those_it_was_made_of() -> None:
    """Balanced: the variance is 0.1**2 of loss, 0.2**2 of lr and (2/3) * 0.03**2 of seeds, nothing else."""
    runs = [
        run({"a": 2 + loss + lr + seed}, number, loss=str(loss), optimizer__lr=str(lr))
        for loss in (-0.1, 0.1)
        for lr in (-0.2, 0.2)
        for number, seed in ((1, -0.03), (2, 0.0), (3, 0.03))
    ]
    found, rest = effects(compare(runs, "here"))
    variance = {"optimizer.lr": 0.04, "loss": 0.01, "train.seed": 0.0006}
    total = sum(variance.values())
    assert [effect.key for effect in found] == list(variance) and rest == pytest.approx(0, abs=1e-9)
    assert [effect.share for effect in found] == pytest.approx([v / total for v in variance.values()])
    assert [(level.value, level.runs) for level in found[1].levels] == [("-0.1", 6), ("0.1", 6)]
    assert [level.effect for level in found[1].levels] == pytest.approx([-0.1, 0.1])


def test_runs_without_any_noise_warn_of_nothing() -> None:
    runs = [run({"a": 2.0 + 2 * (loss == "b")}, seed, loss=loss) for loss in ("a", "b") for seed in (1, 2)]
    with warnings.catch_warnings(action="error"):
        by_key = {effect.key: effect for effect in effects(compare(runs, "here"))[0]}
    assert by_key["loss"].share == pytest.approx(1) and by_key["loss"].p < 1e-9


def test_noise_is_no_effect() -> None:
    random = np.random.default_rng(3)
    runs = [
        run({"a": 2 + random.normal(0, 0.1)}, seed, loss=loss) for loss in ("a", "b") for seed in range(1, 9)
    ]
    by_key = {effect.key: effect for effect in effects(compare(runs, "here"))[0]}
    low, high = by_key["loss"].levels
    assert by_key["loss"].p > 0.05 and low.low < 0 < low.high and high.effect == pytest.approx(-low.effect)


def test_values_of_a_search_are_taken_in_parts() -> None:
    rates = np.geomspace(1e-5, 1e-3, 24)
    runs = [run({"a": 2 + (math.log10(rate) + 4) ** 2}, optimizer__lr=f"{rate:g}") for rate in rates]
    (effect,), _ = effects(compare(runs, "here"))
    assert [level.runs for level in effect.levels] == [6, 6, 6, 6] and effect.share > 0.6
    assert effect.levels[1].effect < 0 < effect.levels[0].effect, "the middle of the range is the best"


def test_keys_that_change_together_are_not_told_apart() -> None:
    runs = [
        run({"a": value}, seed, loss=v, peft__rank=v)
        for v, value in (("1", 1.0), ("2", 2.0))
        for seed in (1, 2)
    ]
    found, _ = effects(compare(runs, "here"))
    assert {effect.key: round(effect.share, 6) for effect in found} == {
        "loss": 0,
        "peft.rank": 0,
        "train.seed": 0,
    }


def test_nothing_is_said_of_too_few_runs() -> None:
    assert effects(compare([run({"a": 1.0}, loss="a"), run({"a": 2.0}, loss="b")], "here"))[0] == []


def test_no_effect_is_made_up_where_a_value_comes_only_with_one_of_another_key() -> None:
    """tau is "-" where loss is mean: what of the 0.3 is of which key is not in the runs."""
    lines = (("mean", "-", 0.3), ("coba", "1", 0.0), ("coba", "2", 0.1))
    runs = [
        run({"a": 1 + more + seed / 1000}, seed, loss=loss, loss__tau=tau)
        for loss, tau, more in lines
        for seed in (1, 2, 3)
    ]
    by_key = {effect.key: effect for effect in effects(compare(runs, "here"))[0]}
    assert by_key["loss.tau"].share > 0.05 and by_key["loss.tau"].p < 0.001
    assert by_key["loss.tau"].levels == by_key["loss"].levels == () and by_key["train.seed"].levels
