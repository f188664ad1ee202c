"""Whether a lower or a higher value of a metric is better: by its name, or as the person says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mft.errors import UserError, nearest

LOSSES = ("mean", "worst", "weighted")
"""Metrics of a comparison beside the tasks; all are validation losses."""

OURS = {
    r"(train|valid|test|best/valid)/loss(/.*)?|valid/(worst|weighted|perplexity/.*)|train/router": "lower",
    r"memory/.*|speed/(seconds_per_step|(run/)?data_wait_share)|total/.*": "lower",
    r"speed/(run/)?(\w*tokens_per_second|[mh]fu)|data/fill": "higher",
    r"system/gpu_\d+_utilization_percentage": "higher",
    r"system/.*_usage_\w+": "lower",
}
"""Full names that mft logs (docs/architecture.md), whatever the tasks are called."""

WHOLE = {
    r"(bits|bytes|nats)_per_(byte|token|word|char)|brier(_score)?|ece|ter"
    r"|.*hallucination.*|.*toxicity.*": "lower",
    r"mc[12]|(prompt|inst)_level_(strict|loose)_acc|.*tokens_per_second|acc_(norm|mutual_info).*": "higher",
}
"""The last part of any other name, where its words alone would not tell or tell wrongly."""

LOWER = r"loss|nll|perplexity|ppl|bpb|errors?|wer|cer|mse|mae|rmse|seconds|latency|time|gib"
HIGHER = (
    r"acc|accuracy|f1|em|mcc|bleu|sacrebleu|rouge.?(sum)?|meteor|comet|bertscore|chrf|auc|auroc|map|mrr|ndcg"
    r"|precision|recall|reward|score|pass|match|correct|win|mfu|second|pearson\w*|spearman\w*"
)
"""Words in the last part of any other name. `second`: so many per second; `pass`: pass@1."""


def directions(metrics: Sequence[str], tasks: Sequence[str], better: str = "") -> dict[str, bool]:
    """Returns {metric: whether the highest value is the best one}.

    tasks: names of tasks, which as metrics are their validation losses; better: lower or higher, of the first
    metric and of those whose names do not tell; "" to go by the names. Raises UserError for another word, and
    where a name does not tell.
    """
    if better not in ("", "lower", "higher"):
        hint = nearest(better, ("lower", "higher")) or "."
        raise UserError(f"--better {better}: must be lower or higher{hint}")
    known = {metric: _by_name(metric, tasks) for metric in metrics}
    said = {metric for place, metric in enumerate(known) if better and (place == 0 or known[metric] is None)}
    known |= dict.fromkeys(said, better == "higher")
    if unclear := [metric for metric, told in known.items() if told is None]:
        one = "its name does not tell" if len(unclear) == 1 else "their names do not tell"
        problem = f"{one} whether a lower or a higher value is better"
        raise UserError(f"--metric {', '.join(unclear)}: {problem}; add --better lower, or --higher.")
    return {metric: bool(told) for metric, told in known.items()}


def _by_name(metric: str, tasks: Sequence[str]) -> bool | None:
    """Returns whether a higher value is better; None where the name does not tell."""
    if metric in LOSSES or metric in tasks:
        return False
    last = metric.rpartition("/")[2]
    for patterns, name in ((OURS, metric), (WHOLE, last.lower())):
        for pattern, direction in patterns.items():
            if re.fullmatch(pattern, name):
                return direction == "higher"
    words = re.split(r"[\W_]+", last.lower())
    lower, higher = (any(re.fullmatch(pattern, word) for word in words) for pattern in (LOWER, HIGHER))
    return None if lower == higher else higher
