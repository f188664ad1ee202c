"""What is compared with what, and when a winner may be named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mft.comparison.compare import compare
from mft.comparison.multitask import front, multitask
from mft.comparison.notes import notes
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


def test_a_setting_that_lost_its_worst_seed_is_no_winner() -> None:
    """b lost its worst seed; in those that both have, a is lower by 0.02."""
    runs = [*seeds("a", 1.0, 2.0, 3.0, 9.0), *seeds("b", 1.02, 2.021, 3.02)]
    result = compare(runs, "here")
    assert result.settings[0].title == "loss=b" and result.winner is None
    assert verdict(result, result.settings[1]) == "lower"
    assert "No winner: loss=b has the lowest mean, but loss=a is lower in pairs with it" in sentence(result)
    assert any("Not all settings have the same seeds" in note for note in notes(result))


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
        and any("left out: y (1 of 2 runs), z (1 of 2 runs)" in n for n in notes(mean))
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


def test_the_best_mean_of_other_seeds_is_no_winner() -> None:
    """Seeds 1 and 2 are easy, and only one setting has them: in pairs it is the worse one."""
    runs = [*seeds("a", 1.0, 1.001, 3.0, 3.002, 3.001)]
    runs += [run({"a": 2.9}, seed, loss="b") for seed in (3, 4, 5)]
    result = compare(runs, "here")
    assert result.ranked[0].title == "loss=a" and result.winner is None
    assert "loss=a has the lowest mean, but loss=b is lower in pairs with it" in sentence(result)
    assert any("Not all settings have the same seeds" in note for note in notes(result))


def test_runs_without_a_value_are_named() -> None:
    runs = [*seeds("a", 1.0, 1.1, float("inf")), *seeds("b", 2.0, 2.1, 2.2)]
    for row in runs[2].rows:
        row["valid/loss/a"] = float("inf")
    said = notes(compare(runs, "here"))
    assert any("not counted in their settings: a-3 (finished)." in note for note in said)


@pytest.mark.parametrize(
    ("baseline", "others", "said", "word"),
    [
        ([], seeds("b", 1.0), "the baseline (loss=a) has no value of mean", "baseline without a value"),
        (seeds("a", 1.0), [run({"a": 2.0}, 2, loss="b")], "has a seed in common", "no seed in common"),
    ],
)
def test_a_baseline_that_nothing_can_be_compared_with_is_told(
    baseline: list[Run], others: list[Run], said: str, word: str
) -> None:
    empty = Run("empty", {"loss": "a", "train.seed": "9", "data.paths": "[]"}, [], "running")
    result = compare([*(baseline or [empty]), *others], "here", baseline="loss=a")
    (other,) = [setting for setting in result.settings if setting.keys["loss"] == "b"]
    assert said in sentence(result) and verdict(result, other) == word


def test_words_fit_the_number_of_values_and_seeds() -> None:
    empty = Run("empty", {"loss": "c", "train.seed": "1", "data.paths": "[]"}, [], "running")
    assert sentence(compare([*seeds("a", 1.0), empty], "here")).startswith("Only one setting has a value")
    apart = [*seeds("a", 1.0, 1.1), *(run({"a": 2.0}, seed, loss="b") for seed in (2, 3))]
    assert "no other setting has two seeds in common with the lowest" in sentence(compare(apart, "here"))


def with_rows(folder: Path, shift: int = 0, longer: int = 1, **values: str) -> list[Run]:
    """Returns two settings on three seeds, whose second one has other keys or tokens of its 60 rows."""
    random, runs = np.random.default_rng(0), []
    tokens_N, hard_N = random.integers(5, 50, 60).astype(float), random.normal(2.0, 0.5, 60)
    for loss, worse in (("a", 0.0), ("b", 0.05)):
        for seed in (1, 2, 3):
            of_b = loss == "b"
            row_N, own_N = np.arange(60) + shift * of_b, tokens_N * (longer if of_b else 1)
            loss_N = (hard_N + worse + random.normal(0, 0.001) + random.normal(0, 0.02, 60)) * own_N
            place = folder / f"{loss}{seed}"
            runs.append(
                run(write_rows(place, 20, x=(row_N, own_N, loss_N)), seed, place, loss=loss, **values)
            )
    return runs


@pytest.mark.parametrize("seeds", [1, 3])
def test_other_tokens_of_the_same_rows_leave_the_interval_around_the_difference(
    seeds: int, tmp_path: Path
) -> None:
    """Of twice as many tokens, loss sums are twice as large: their difference would be one of length."""
    same, longer = (
        compare([r for r in with_rows(tmp_path / str(n), longer=n) if (r.seed or 0) <= seeds], "here")
        for n in (1, 2)
    )
    known, found = same.difference(same.settings[1]), longer.difference(longer.settings[1])
    assert known is not None and found is not None
    assert (found.low, found.estimate, found.high) == pytest.approx(
        (known.low, known.estimate, known.high), abs=1e-6
    )
    assert found.other_tokens and not known.other_tokens
    assert any("other tokens of the same rows" in note for note in notes(longer)) and notes(same) == []


@pytest.mark.parametrize(
    ("shift", "said"), [(10, "differences are of the rows in common"), (60, "are of the rows as well")]
)
def test_other_validation_rows_are_told(shift: int, said: str, tmp_path: Path) -> None:
    result = compare(with_rows(tmp_path, shift), "here")
    assert any(said in note for note in notes(result))
    assert result.winner is None, "a difference of rows is no winner's"


def test_other_data_without_losses_of_rows_is_told() -> None:
    runs = [
        run({"a": 1 + i + s / 10}, s, loss=x, **{"data fingerprint": x})
        for i, x in enumerate("ab")
        for s in (1, 2)
    ]
    assert any(
        "whether the validation rows were the same is not known" in n for n in notes(compare(runs, "h"))
    )


def test_other_keys_that_pair_runs_are_not_called_seeds() -> None:
    """One seed each: what the interval covers is the choice of the learning rate."""
    noise = iter((0.0, 0.0, 0.1, 0.101, 0.2, 0.202))
    runs = [run({"a": 1 + next(noise) + i}, lr=lr, loss=x) for lr in "123" for i, x in enumerate("ab")]
    result = compare(runs, "here", by=["loss"])
    assert "correction, 3 pairs." in sentence(result)
    assert "the choice of lr, on these" in covered(result.differences, result.paired_over)
    more = [run({"a": 1 + i}, 2, lr="1", loss=x) for i, x in enumerate("ab")]
    assert compare([*runs, *more], "here", by=["loss"]).paired_over == "seeds and lr"


def test_a_metric_of_whole_runs_ranks_runs_on_one_task_as_well() -> None:
    """There is no accuracy of single-task runs put together: as a baseline they would leave nothing to say."""
    runs = [run({t: 1.0}, s, task=f"[{t}]") for t in "ab" for s in (1, 2)]
    runs += [run({"a": 1.0, "b": 1.0}, s, task="[a,b]") for s in (1, 2)]
    for place, one in enumerate(runs):
        one.metrics["mmlu/acc"] = 0.5 + place // 2 / 10 + place % 2 / 1000
    result = compare(runs, "here", ["mmlu/acc"])
    assert not result.baseline and len(result.ranked) == 3 and result.winner is result.ranked[0]
    assert result.ranked[0].keys == {"task": "[a,b]"} and "is higher than all others" in sentence(result)


def test_small_differences_are_written_with_their_digits() -> None:
    runs = [*seeds("a", 1.0, 2.0, 3.0), *seeds("b", 1 + 1e-5, 2 + 1.01e-5, 3 + 1.02e-5)]
    assert "by 0.0000101 [0.0000099, 0.0000103]" in sentence(compare(runs, "here"))


def test_what_could_have_been_told_is_of_the_settings_that_were_not() -> None:
    """One setting is close to the best in every seed and told apart, the other two are not."""
    runs = [*seeds("a", 1.0, 1.1, 1.2), *seeds("b", 1.5, 1.6001, 1.7)]
    runs += [*seeds("c", 1.6, 1.5, 1.9), *seeds("d", 1.6, 2.9, 1.1)]
    result = compare(runs, "here")
    _, *open_ = [d.detectable for d in result.differences if d is not None]
    assert f"{min(open_):.2g} to {max(open_):.2g}, by setting, would have been told" in sentence(result)


def test_a_validation_with_a_loss_that_is_no_number_does_not_count() -> None:
    one = run({"a": 2.0, "b": 1.0})
    one.rows[2]["valid/loss/a"] = float("nan")  # the best one, whose worst loss would be that of b
    (setting,) = compare([one], "here", ["worst"]).settings
    assert setting.mean(Metric("worst")) == pytest.approx(2.1)


def test_of_many_settings_it_is_told_that_rows_are_read_of_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = with_rows(tmp_path) + [run({"x": 3.0}, seed, loss="c") for seed in (1, 2, 3)]
    for most, told in ((2, True), (3, False)):
        for module in ("compare", "notes"):
            monkeypatch.setattr(f"mft.comparison.{module}.DETAILED", most)
        said = notes(compare(runs, "here"))
        assert told == any(f"read of the best {most} settings; others" in note for note in said)


def test_runs_that_training_made_worse_are_counted() -> None:
    runs = [*seeds("a", 1.0, 1.1), *seeds("b", 9.0)]
    assert "The best validation of 1 run is the one before training." in notes(compare(runs, "here"))
