"""Groups of seeds, their order, and when a winner may be named."""

from __future__ import annotations

import math

import pytest

from mft.errors import UserError
from mft.runs.ranking import Group, columns, grouped, pooled, prepare, verdicts
from mft.runs.results import Run


def run(loss: float | None, **values: str) -> Run:
    rows = [] if loss is None else [{"step": 1, "valid/loss/a": loss}, {"step": 2, "valid/loss/a": loss + 1}]
    return Run("one", values, rows, "finished", seconds=10.0)


def group(name: str, *losses: float) -> Group:
    return Group({"loss": name}, [run(loss) for loss in losses], "mean")


def test_groups_are_ordered_by_their_mean_and_those_without_a_value_come_last() -> None:
    runs = [
        run(3.0, lr="3"),
        run(None, lr="0"),
        run(1.0, lr="1"),
        run(2.0, lr="2"),
        run(1.5, lr="1"),
        run(0.5),
    ]
    groups = grouped(runs, ["lr"], "mean")
    assert [group.label for group in groups] == ["lr=-", "lr=1", "lr=2", "lr=3", "lr=0"]
    assert groups[1].numbers() == [1.0, 1.5] and groups[1].mean() == 1.25, "the best of a run is its lowest"
    assert math.isnan(groups[-1].mean()) and groups[0].spread() is None
    assert [group.label for group in grouped(runs, ["lr"], "mean", higher=True)][:2] == ["lr=3", "lr=2"]
    assert grouped(runs, [], "mean")[0].label == "(all as given)"


def test_the_noise_is_pooled_by_degrees_of_freedom() -> None:
    assert pooled([group("a", 1.0), group("b", 2.0)]) is None
    assert pooled([group("a", 1.0, 3.0), group("b", 9.0)]) == pytest.approx(math.sqrt(2))
    three, two = group("a", 1.0, 2.0, 3.0), group("b", 0.0, 4.0)  # variances 1 and 8
    assert pooled([three, two]) == pytest.approx(math.sqrt((2 * 1 + 1 * 8) / 3))


@pytest.mark.parametrize(
    ("groups", "words", "sentence"),
    [
        ([group("a", 1.0), group("b", 9.0)], ["lowest", "one seed: not told apart"], "No winner"),
        (
            [group("a", 1.0), group("b", 9.0, 9.1)],
            ["lowest", "not told apart: lowest has one seed"],
            "No winner",
        ),
        (
            [group("a", 1.0, 1.2), group("b", 1.1, 1.3)],
            ["lowest", "within seed noise"],
            "No winner: one more is",
        ),
        (
            [group("a", 1.0, 1.01), group("b", 2.0, 2.01)],
            ["lowest", "higher"],
            "loss=a is lower than all others",
        ),
        ([group("a", 1.0, 1.01)], ["lowest"], "nothing to compare it with"),
        ([group("a")], ["no value"], "No run has a value"),
    ],
)
def test_a_winner_is_named_only_where_seeds_tell_it_apart(
    groups: list[Group], words: list[str], sentence: str
) -> None:
    found, told = verdicts(groups)
    assert found == words and sentence in told


def test_the_table() -> None:
    head, rows = columns(
        prepare([run(1.0, lr="1", **{"train.seed": "1"}), run(2.0, lr="2")], "mean", ["lr"]), "mean"
    )
    assert head == ["rank", "lr", "n", "mean", "spread", "worst", "a", "seconds", "GiB", "verdict"]
    assert rows[0] == ["1", "1", "1", "1.0000", "n = 1", "1.0000", "1.0000", "10", "", "lowest"]


def test_what_no_run_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"--group-by lrr: no run has this key; did you mean lr\?"):
        prepare([run(1.0, lr="1")], "mean", ["lrr"])
    with pytest.raises(UserError, match=r"--metric wurst: no run logged this metric; did you mean worst\?"):
        prepare([run(1.0, lr="1")], "wurst", [])
