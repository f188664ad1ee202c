"""Which direction of a metric is better."""

from __future__ import annotations

import pytest

from mft.comparison.direction import directions
from mft.errors import UserError


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("mean", False),
        ("worst", False),
        ("accuracy", False),  # the name of a task: its loss
        ("valid/loss/accuracy", False),
        ("test/loss/accuracy", False),
        ("best/valid/loss", False),
        ("total/flops", False),
        ("valid/perplexity/f1", False),
        ("speed/tokens_per_second", True),
        ("tokens_per_second", True),
        ("speed/seconds_per_step", False),
        ("speed/mfu", True),
        ("speed/hfu", True),
        ("speed/run/all_tokens_per_second", True),
        ("speed/data_wait_share", False),
        ("total/seconds/training", False),
        ("memory/peak_gib/loading", False),
        ("memory/peak_gib", False),
        ("system/gpu_0_utilization_percentage", True),
        ("system/system_memory_usage_megabytes", False),
        ("eval/accuracy", True),
        ("hellaswag/acc", True),
        ("hellaswag/acc_norm", True),
        ("gsm8k/strict-match/exact_match", True),
        ("pass@1", True),
        ("humaneval/pass_at_10", True),
        ("exact_match", True),
        ("rougeL", True),
        ("rougeLsum", True),
        ("macro-F1", True),
        ("chrf", True),
        ("cola/mcc", True),
        ("truthfulqa/mc2", True),
        ("wikitext/bits_per_byte", False),
        ("wikitext/word_perplexity", False),
        ("wmt/ter", False),
        ("brier_score", False),
        ("eval/error_rate", False),
        ("test_loss", False),
    ],
)
def test_the_direction_follows_from_the_name(metric: str, higher: bool) -> None:
    assert directions([metric], ["accuracy"]) == {metric: higher}
    assert directions([metric], ["accuracy"], "higher") == {metric: True}


@pytest.mark.parametrize(
    "metric", ["lr", "epoch", "train/weight/x", "grad_norm", "accuracy_loss", "my_metric", "best/step"]
)
def test_a_name_that_does_not_tell_is_asked_about(metric: str) -> None:
    with pytest.raises(UserError, match="add --better lower, or --higher"):
        directions([metric], ["x"])
    with pytest.raises(UserError, match="must be lower or higher; did you mean higher"):
        directions([metric], ["x"], "highr")


def test_several_metrics_have_a_direction_each() -> None:
    assert directions(["mean", "x/acc"], []) == {"mean": False, "x/acc": True}
    of_first_and_odd = {"mean": True, "x/acc": True, "odd": True, "x/loss": False}
    assert directions(list(of_first_and_odd), [], "higher") == of_first_and_odd
    with pytest.raises(UserError, match="--metric odd, even: their names do not tell"):
        directions(["odd", "x/acc", "even"], [])
