"""What is compared with what, and when a winner may be named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mft.comparison.compare import compare
from mft.comparison.multitask import front, multitask
from mft.comparison.settings import Metric
from mft.comparison.statistics import Covers
from mft.comparison.verdicts import covered, sentence, verdict
from mft.errors import UserError
from mft.runs.results import Run
from tests.comparison.made_runs import run, write_rows


def seeds(loss: str, *means: float, tasks: tuple[str, ...] = ("a",), **values: str) -> list[Run]:
    """Returns a run for each mean, of the seeds 1, 2, ..."""
    return [
        run(dict.fromkeys(tasks, mean), seed, loss=loss, **values) for seed, mean in enumerate(means, start=1)
    ]


def test_settings_are_ordered_by_their_mean_and_those_without_a_value_come_last() -> None:
    runs = [*seeds("c", 3.0), *seeds("a", 1.0, 2.0), *seeds("b", 2.0)]
    runs.append(Run("empty", {"loss": "none", "train.seed": "1", "data.paths": "[]"}, [], "running"))
    result = compare(runs, "here")
    assert [setting.title for setting in result.settings] == ["loss=a", "loss=b", "loss=c", "loss=none"]
    assert result.settings[0].mean(Metric("mean")) == 1.5 and result.settings[0].spread(Metric("mean"))
    assert (
        result.settings[1].spread(Metric("mean")) is None
        and verdict(result, result.settings[-1]) == "no value"
    )


def test_a_run_is_judged_by_one_validation_whatever_is_read_of_it() -> None:
    """The lowest loss of each task for itself would be of models that nobody has."""
    rows = [
        {"step": 1, "valid/loss/a": 1.0, "valid/loss/b": 3.0},
        {"step": 2, "valid/loss/a": 2.0, "valid/loss/b": 1.0},
    ]
    (setting,) = compare([Run("one", {"train.seed": "1"}, rows, "finished")], "here").settings
    assert [setting.mean(Metric(name)) for name in ("mean", "a", "b", "worst")] == [1.5, 2.0, 1.0, 2.0]


def test_differences_are_taken_within_seeds() -> None:
    """The spread between seeds is 50 times the difference, which is the same in each of them."""
    runs = [*seeds("a", 1.0, 2.0, 3.001), *seeds("b", 1.02, 2.021, 3.02)]
    result = compare(runs, "here")
    found = result.difference(result.settings[1])
    assert found is not None and found.told_apart and found.covers is Covers.seeds
    assert result.winner is result.settings[0] and verdict(result, result.settings[1]) == "higher"
    assert re.search(r"loss=a is lower than all others: by 0\.02.* p = .* 3 seeds", sentence(result))
    assert "cover the choice of seeds, on these" in covered(result.differences)


@pytest.mark.parametrize(
    ("runs", "word", "said"),
    [
        (
            [*seeds("a", 1.0), *seeds("b", 9.0)],
            "one seed: not told apart",
            "No winner: the lowest mean is of one",
        ),
        (
            [*seeds("a", 1.0), *seeds("b", 9.0, 9.1)],
            "one seed: not told apart",
            "No winner: the lowest mean is",
        ),
        (
            [*seeds("a", 1.0, 1.2), *seeds("b", 1.1, 1.4)],
            "not told apart",
            "No winner: one more is not told",
        ),
        ([*seeds("a", 1.0, 1.5, 1.2), *seeds("b", 1.1, 1.4, 1.31)], "not told apart", "A difference of "),
        ([*seeds("a", 1.0, 1.01)], "lowest", "nothing to compare it with"),
        ([run({"a": 1.0}, 1, loss="a"), run({"a": 2.0}, 2, loss="b")], "no seed in common", "No winner"),
    ],
)
def test_a_winner_is_named_only_where_pairs_of_seeds_tell_it_apart(
    runs: list[Run], word: str, said: str
) -> None:
    result = compare(runs, "here")
    assert verdict(result, result.settings[-1]) == word and said in sentence(result) and result.winner is None


def test_the_best_mean_of_other_seeds_is_no_winner() -> None:
    """b lost its worst seed; in those that both have, a is lower by 0.02."""
    runs = [*seeds("a", 1.0, 2.0, 3.0, 9.0), *seeds("b", 1.02, 2.021, 3.02)]
    result = compare(runs, "here")
    assert result.settings[0].title == "loss=b" and result.winner is None
    assert verdict(result, result.settings[1]) == "lower"
    assert sentence(result) == "No winner: in equal seeds loss=a is lower than the lowest mean, loss=b."
    assert any("Not all settings have the same seeds" in note for note in result.notes)


def test_the_best_of_many_is_held_to_all_pairs_a_baseline_to_its_own() -> None:
    runs = [r for loss, shift in (("a", 0.0), ("b", 0.02), ("c", 0.03)) for r in seeds(loss, *_near(shift))]
    best, named = compare(runs, "here"), compare(runs, "here", baseline="loss=a")
    of_best, of_named = (one.difference(one.settings[1]) for one in (best, named))
    assert of_best is not None and of_named is not None and of_best.p == of_named.p
    assert of_best.adjusted_p > of_named.adjusted_p and named.baseline == "loss=a"
    assert named.winner is None and "than the baseline (loss=a)" in sentence(named)


def _near(shift: float) -> list[float]:
    noise = np.random.default_rng(int(1000 * shift)).normal(0, 0.0005, 4)
    return [1 + seed / 10 + shift + more for seed, more in enumerate(noise)]


def test_rows_are_paired_across_task_sets_and_seeds(tmp_path: Path) -> None:
    """One setting was validated on rows of two tasks, the other one on fewer rows of one, in another order."""
    random, runs = np.random.default_rng(0), []
    row_N, tokens_N = np.arange(300) * 7, random.integers(5, 50, 300).astype(float)
    hard_N = random.normal(2.0, 0.5, 300)
    for loss, shift, order in (("a", 0.0, np.arange(300)), ("b", 0.05, random.permutation(300)[:280])):
        folder = tmp_path / loss
        sums_N = (hard_N + shift + random.normal(0, 0.02, 300)) * tokens_N
        tasks = {"x": (row_N[order], tokens_N[order], sums_N[order])}
        tasks |= {"y" if loss == "a" else "z": (row_N + 1, tokens_N, sums_N)}
        runs.append(run(write_rows(folder, 20, **tasks), 1, folder, loss=loss))
    result = compare(runs, "here", ["x"])
    found = result.difference(result.settings[1])
    assert found is not None and found.covers is Covers.rows and found.rows == 280
    assert 0.04 < found.low < found.estimate < found.high < 0.06 and not found.told_apart
    assert verdict(result, result.settings[1]) == "one seed: higher on these rows"
    assert "No winner" in sentence(result) and "validation rows only" in covered(result.differences)
    mean = compare(runs, "here")
    assert (
        mean.tasks == ["x"]
        and mean.other_tasks == {"y": 1, "z": 1}
        and any("left out: y (1 of 2 runs), z (1 of 2 runs)" in n for n in mean.notes)
    )


def test_single_task_runs_are_a_baseline_beside_mixes() -> None:
    runs = [
        run({task: loss}, seed, task=f"[{task}]")
        for task, loss in (("a", 1.0), ("b", 2.0))
        for seed in (1, 2)
    ]
    runs += [run({"a": 0.9, "b": 2.2}, seed, task="[a,b]", loss="x") for seed in (1, 2)]
    runs += [run({"a": 1.1, "b": 1.0}, seed, task="[a,b]", loss="y") for seed in (1, 2)]
    result = compare(runs, "here")
    assert result.baseline == "single-task runs" and len(result.settings) == 2
    accounts = dict(zip([s.keys["loss"] for s in result.settings], multitask(result), strict=True))
    # saved: 10 % on a and -10 % on b; -10 % on a and 50 % on b
    assert accounts["x"].delta_m == pytest.approx(0.0) and accounts["y"].delta_m == pytest.approx(20.0)
    assert accounts["x"].regret_task == "b" and accounts["x"].regret == pytest.approx(120.0)
    assert accounts["x"].on_front and accounts["y"].on_front
    found = result.difference(result.settings[0])
    assert found is not None and found.estimate == pytest.approx(1.05 - 1.5), "mean over both tasks"
    alone = compare(runs, "here", ["a"])
    assert not alone.baseline and len(alone.ranked) == 3, "by one task all that have it are ranked"


def test_the_base_model_is_known_by_the_validation_before_training() -> None:
    assert compare([*seeds("a", 1.0), *seeds("b", 2.0)], "here").base == {"": {"a": 4.0}}
    two = [run({"a": 1.0}, start=3.0, model="x"), run({"a": 1.0}, start=5.0, model="y")]
    assert compare(two, "here").base == {"x": {"a": 3.0}, "y": {"a": 5.0}}


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (2.0, 3.0), None, (1.0, 3.0)]
    assert front(points) == [True, True, True, False, False, True]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": ["lo"]}, "--group-by lo: no run has this key; did you mean loss?"),
        ({"metrics": ["wurst"]}, "--metric wurst: no run logged this metric; did you mean worst?"),
        ({"baseline": "los=a"}, "--baseline los=a: no run has this key; did you mean loss?"),
        ({"baseline": "loss=c"}, "--baseline loss=c: no run has this value. Allowed: a, b"),
        ({"baseline": "train.seed=1"}, "has to fit one setting, fits 0: none"),
        ({"baseline": "single"}, "needs runs on one task each"),
    ],
)
def test_what_no_run_has_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        compare([*seeds("a", 1.0, 1.1), *seeds("b", 2.0, 2.1)], "here", **given)  # type: ignore[arg-type]
