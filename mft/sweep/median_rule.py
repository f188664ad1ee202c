"""The median rule (launch.prune): a job whose best objective is worse than the median of the others ends
early."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from mft.run_folder import RunStatus
from mft.sweep.pool import SweepJob

OTHERS = 3
"""Jobs that must have come as far as the one that is to be pruned."""


def should_prune(job: SweepJob, jobs: Sequence[SweepJob], validations: int) -> str:
    """Returns why a job is to be pruned, "" while it is not.

    Its best objective so far is compared with the best that the others had at the same step: those that have
    come as far, at least OTHERS of them. validations: how many the job gets before it may be pruned
    (launch.prune_after); the one before the first step does not count.
    """
    steps = [step for step in job.values if step > 0]
    if len(steps) < validations:
        return ""
    step, own = max(steps), min(job.values.values())
    bests = []
    for other in jobs:
        until = [value for at, value in other.values.items() if at <= step]
        if other is not job and other.state != RunStatus.same and until and max(other.values) >= step:
            bests.append(min(until))
    if len(bests) < OTHERS or own <= median(bests):
        return ""
    return f"at step {step} its best is {own:.4f}, the median of {len(bests)} others {median(bests):.4f}"
