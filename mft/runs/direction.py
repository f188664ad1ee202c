"""Whether a lower or a higher value of a metric is better: by its name, or as the person says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mft.errors import UserError, nearest

LOSSES = ("mean", "worst", "weighted")
"""Metrics of a comparison beside the tasks; all are validation losses."""

OURS = {
    r"(train|valid|test|best/valid)/loss(/.*)?|valid/(worst|weighted|perplexity/.*)|train/router": "lower",
    r"memory/.*|speed/seconds_per_step": "lower",
    r"speed/(tokens_per_second|mfu)|data/fill": "higher",
}
"""Full names that mft logs (docs/architecture.md), whatever the tasks are called."""

LOWER = r"loss|nll|perplexity|ppl|errors?|wer|cer|mse|mae|rmse|seconds|latency|time|gib"
HIGHER = r"acc|accuracy|f1|em|bleu|rouge.?|chrf|auc|precision|recall|reward|score|pass|match|mfu|second"
"""Words in the last part of any other name. `second`: so many per second; `pass`: pass@1."""


def higher_is_better(metric: str, tasks: Sequence[str], better: str = "") -> bool:
    """Returns whether the highest value of a metric is the best one.

    tasks: names of tasks, which as metrics are their validation losses; better: lower or higher, which
    decides; "" to go by the name. Raises UserError for another word, and where the name does not tell.
    """
    if better:
        if better not in ("lower", "higher"):
            hint = nearest(better, ("lower", "higher")) or "."
            raise UserError(f"--better {better}: must be lower or higher{hint}")
        return better == "higher"
    if metric in LOSSES or metric in tasks:
        return False
    for pattern, direction in OURS.items():
        if re.fullmatch(pattern, metric):
            return direction == "higher"
    words = re.split(r"[\W_]+", metric.rpartition("/")[2].lower())
    lower, higher = (any(re.fullmatch(pattern, word) for word in words) for pattern in (LOWER, HIGHER))
    if lower == higher:
        unclear = f"--metric {metric}: its name does not tell whether a lower or a higher value is better"
        raise UserError(f"{unclear}; add --better lower or --better higher.")
    return higher
