"""A plan as JSON, for programs: docs/plan.md names the keys."""

from __future__ import annotations

import json
from typing import Any

from mft.plan.answer import Answer, Outcome
from mft.plan.report import command

FORMAT = 1
"""Raised where a key changes its meaning."""


def as_json(answer: Answer) -> str:
    """Returns the answer as JSON: bytes, seconds and counts, no words."""
    first, data = answer.outcomes[0].plan, answer.data
    values: dict[str, Any] = {
        "format": FORMAT,
        "parameters": {"total": first.skeleton.total, "trained": first.skeleton.sizes.trained},
        "devices": [_device(answer, outcome) for outcome in answer.outcomes],
        "data": None,
    }
    if data:
        counted = ("samples", "epochs", "tokens", "trained", "steps")
        values["data"] = {
            "about": data.about,
            "steps": data.steps,
            "tokens": data.tokens,
            "trained": data.trained,
            "tasks": {task.name: {name: getattr(task, name) for name in counted} for task in data.tasks},
        }
    return json.dumps(values, indent=2, ensure_ascii=False)


def _device(answer: Answer, outcome: Outcome) -> dict[str, Any]:
    plan, case = outcome.plan, outcome.plan.case
    values: dict[str, Any] = {
        "device": case.device.shown,
        "ranks": case.world,
        "precision": case.cfg.train.precision.value,
        "memory": case.memory,
        "usable": plan.room,
        "needed": plan.peak,
        "fits": plan.fits,
        "host_memory": case.host,
        "host_needed": plan.on_host,
        "parts": plan.memory.parts,
        "host": plan.memory.host,
        "peaks": {name: getattr(plan.memory, name) for name in ("loading", "step", "saving")},
        "recomputed_every": plan.every,
        "rows_per_micro_batch": case.sizes.per_device,
        "rows_per_step": case.sizes.total,
        "tokens_per_step": plan.tokens,
        "flops_per_step": plan.time.flops,
        "seconds_per_step": outcome.seconds,
        "seconds": outcome.run_seconds,
        "rate": outcome.rate.words,
        "advice": None,
    }
    if outcome.advice is not None:
        values["advice"] = [
            {
                "overrides": list(advice.overrides),
                "needed": advice.plan.peak,
                "host_needed": advice.plan.on_host,
                "fits": advice.plan.fits,
                "slower": advice.slower(plan),
                "changes": advice.effect,
                "command": command(answer, advice.overrides),
            }
            for advice in outcome.advice
        ]
    return values
