"""Names that tell runs apart within 20 characters."""

from __future__ import annotations

import itertools

import pytest

from mft.console.short_names import ROOM, short_names


def grid(**axes: list[str]) -> list[dict[str, str]]:
    keys = [key.replace("__", ".") for key in axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*axes.values())]


def test_the_values_that_differ_the_option_first_and_the_seed_last() -> None:
    settings = grid(train__seed=["1", "2"], optimizer__lr=["0.06", "0.0002"], loss=["coba", "famo"])
    names = short_names([setting | {"peft": "lora"} for setting in settings])
    assert names[0] == "coba · 6e-2 · s1" and names[-1] == "famo · 2e-4 · s2" and len(set(names)) == 8


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([{"peft.rank": "16"}, {"peft.rank": "8"}], ["rank 16", "rank 8"]),
        ([{"peft": "none"}, {"peft": "lora"}], ["peft none", "lora"]),
        ([{"optimizer.lr": "null"}, {"optimizer.lr": "5e-4"}], ["lr null", "5e-4"]),
        ([{"data.paths": "[/d/x,'/d/y/']"}, {"data.paths": "[/d/x]"}], ["x+y", "x"]),
        ([{"model.path": "/m/small"}, {"model.path": "hub/large"}], ["small", "large"]),
        ([{"task": "[sql,code]"}, {"task": "[code,sql]"}], ["sql+code", "code+sql"]),
        ([{"a.dropout": "0.10"}, {"b.dropout": "0.10"}], ["a.dropout 0.1", "b.dropout 0.1"]),
        ([{"loss": "coba"}, {}], ["coba", "as given"]),
        ([{"loss": "coba", "train.seed": "3"}], ["coba · s3"]),
        ([{}], ["as given"]),
        ([], []),
    ],
)
def test_a_word_for_a_value(settings: list[dict[str, str]], names: list[str]) -> None:
    assert short_names(settings) == names


def test_long_words_are_cut_where_they_still_differ_and_numbers_are_not() -> None:
    losses = ["token_mean", "task_token_mean", "task_sample_mean", "sample_mean"]
    names = short_names(grid(loss=losses, optimizer__lr=["1e-3", "2e-3"], train__seed=["1", "2", "3"]))
    assert len(set(names)) == 24 and max(map(len, names)) <= ROOM
    assert all(name.endswith((" · 1e-3 · s" + name[-1], " · 2e-3 · s" + name[-1])) for name in names)


def test_where_cutting_makes_two_equal_a_number_is_appended() -> None:
    values = [f"{'x' * 30}{number}{'y' * 30}" for number in range(12)]
    names = short_names([{"loss": value, "model": value, "peft": value} for value in values])
    assert len(set(names)) == 12 and max(map(len, names)) <= ROOM
    assert short_names([{"loss": "coba"}, {"loss": "coba"}, {"loss": "famo"}]) == ["coba", "coba #2", "famo"]


def test_names_that_were_given_are_kept_and_not_given_again() -> None:
    settings = [{"loss": "coba"}, {"loss": "famo"}, {"loss": "dwa"}]
    assert short_names(settings, ["dwa", "", ""]) == ["dwa", "famo", "dwa #2"]
    assert short_names([{}, {"loss": "dwa"}], ["dwa"]) == ["dwa", "dwa #2"]


def test_a_single_run_leaves_out_words_that_do_not_fit() -> None:
    setting = {"experiment": "demo", "loss": "coba", "optimizer.lr": "1e-4", "train.max_steps": "500"}
    assert short_names([setting], room=13) == ["demo · coba"]
