"""How often the host waits for the GPU, as torch warns of it (A12)."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch

from tests.gpu.children import Cell, Found, Place
from tests.gpu.runs import Case, played

QUIET = ("train.log_every=1000", "scheduler=constant")


def warned(steps: int, micro_batches: int, place: Place) -> Counter[str]:
    """Returns the waits of a run, by their place in the code."""
    sizes = ("train.per_device_batch_size=1", f"train.global_batch_size={micro_batches}")
    more = (*QUIET, f"train.max_steps={steps}", *sizes)
    case = Case("lora", precision="bf16", more=more, label=f"{steps} x {micro_batches}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if place.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        played(case, place)
        if place.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in told if "synchroniz" in str(one.message)]
    return Counter(f"{one.filename.rsplit('/', 2)[-1]}:{one.lineno}" for one in waits)


def waits(place: Place) -> Found:
    """None in a micro-batch and at most three in a step, from runs that differ in nothing but their number."""
    few, more, larger = (warned(*numbers, place) for numbers in ((3, 2), (6, 2), (6, 4)))

    def each(one: Counter[str], two: Counter[str], times: int) -> dict[str, float]:
        return {where: (two[where] - one[where]) / times for where in two if two[where] != one[where]}

    of_step, of_micro_batch = each(few, more, 3), each(more, larger, 12)
    found = Found({"of a step": of_step, "of a micro-batch": of_micro_batch})
    # tests/training/test_host_waits.py counts 0 and 2 on a pretended GPU
    found.holds(sum(of_micro_batch.values()) <= 0.1, "the host waits in a micro-batch")
    found.holds(sum(of_step.values()) <= 3, "the host waits more than three times in a step")
    if place.device == "cuda":
        found.holds(sum(few.values()), "torch has warned of nothing at all, so nothing was counted")
        stats: dict[str, Any] = torch.cuda.memory_stats()
        found.values |= {"allocator retries": stats["num_alloc_retries"]}
    return found


CELLS = [Cell("A12 waits", waits, 90)]
