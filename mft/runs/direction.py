"""Whether a lower or a higher value of a metric is better: by its name, or as the person says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mft.errors import UserError, nearest

LOSSES = ("mean", "worst", "weighted")
"""Metrics of a comparison beside the tasks; all are validation losses."""

OURS = {
    r"(train|valid|test|best/valid)/loss(/.*)?|valid/(worst|weighted|perplexity/.*)|train/router": "lower",
    r"memory/.*|speed/seconds_per_step|total/.*": "lower",
    r"speed/(tokens_per_second|mfu)|data/fill": "higher",
    r"system/gpu_\d+_utilization_percentage": "higher",
    r"system/.*_usage_\w+": "lower",
}
"""Full names that mft logs (docs/architecture.md), whatever the tasks are called."""

WHOLE = {
    r"(bits|bytes|nats)_per_(byte|token|word|char)|brier(_score)?|ece|ter|.*hallucination.*|.*toxicity.*": "lower",
    r"mc[12]|(prompt|inst)_level_(strict|loose)_acc|.*tokens_per_second|acc_(norm|mutual_info).*": "higher",
}
"""The last part of any other name, where its words alone would not tell or tell wrongly."""

LOWER = r"loss|nll|perplexity|ppl|bpb|errors?|wer|cer|mse|mae|rmse|seconds|latency|time|gib"
HIGHER = (
    r"acc|accuracy|f1|em|mcc|bleu|sacrebleu|rouge.?(sum)?|meteor|comet|bertscore|chrf|auc|auroc|map|mrr|ndcg"
    r"|precision|recall|reward|score|pass|match|correct|win|mfu|second|pearson\w*|spearman\w*"
)
"""Words in the last part of any other name. `second`: so many per second; `pass`: pass@1."""


def higher_is_better(metric: str, tasks: Sequence[str], better: str = "", higher: Sequence[str] = ()) -> bool:
    """Returns whether the highest value of a metric is the best one.

    tasks: names of tasks, which as metrics are their validation losses; better: lower or higher, which
    decides; "" to go by the name; higher: metrics of which it is the highest, whatever `better` is. Raises
    UserError for another word, and where the name does not tell.
    """
    return directions([metric], tasks, better, higher)[metric]


def directions(
    metrics: Sequence[str], tasks: Sequence[str], better: str = "", higher: Sequence[str] = ()
) -> dict[str, bool]:
    """Returns {metric: whether the highest value is the best one} of several metrics, as `higher_is_better`.

    Raises UserError also for a name in `higher` that is none of the metrics.
    """
    if better not in ("", "lower", "higher"):
        hint = nearest(better, ("lower", "higher")) or "."
        raise UserError(f"--better {better}: must be lower or higher{hint}")
    for name in higher:
        if name not in metrics:
            raise UserError(f"--higher {name}: is not one of the metrics{nearest(name, metrics) or '.'}")
    known: dict[str, bool | None] = {}
    for metric in metrics:
        told = better == "higher" if better else _by_name(metric, tasks)
        known[metric] = True if metric in higher else told
    if unclear := [metric for metric, told in known.items() if told is None]:
        names = ", ".join(unclear)
        one = "its name does not tell" if len(unclear) == 1 else "their names do not tell"
        raise UserError(
            f"--metric {names}: {one} whether a lower or a higher value is better; add --better lower or "
            f"--better higher, or --higher NAME for single metrics."
        )
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
