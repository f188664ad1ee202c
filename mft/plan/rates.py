"""At which rate a device does matrix work: given, measured in earlier runs here, or a share of its peak."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from mft.files.json_file import read_json
from mft.plan.case import Case
from mft.plan.gpus import REFERENCE, card_of
from mft.plan.time import ASSUMED
from mft.run_folder import metric_rows, runs_under
from mft.training.provenance import device_name

LOOKED_AT = 200
"""Newest runs whose speed is read."""


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one device, and where they are from."""

    tflops: float | None
    """None: what `step_time` assumes."""
    words: str
    """For the line that shows a time; "" where nothing is known, so that no time is reported."""


def rate(of: Case, given: float | None, flops_per_token: float) -> Rate:
    """Returns the rate of a case's device.

    given: TFLOP/s of plan.tflops; flops_per_token: of a step, without recomputation: of several runs the one
    that is nearest counts.
    """
    if given is not None:
        return Rate(given, f"plan.tflops={given:g} a device")
    if found := measured(of, flops_per_token):
        return found
    card = of.device.card
    if of.device.kind == "cpu" or card is None:
        return Rate(None, "")
    like = f"of an {REFERENCE}'s" if of.device.name.endswith("GiB") else "of its"
    return Rate(None, f"assumed: {ASSUMED:.0%} {like} {card.tflops:g} TFLOP/s")


def measured(of: Case, flops_per_token: float) -> Rate | None:
    """Returns the rate of the run on this kind of device whose work a token is nearest, None without any."""
    outputs = Path(of.cfg.output_dir).parents[1]
    nearest, best = math.inf, None
    for folder in runs_under(outputs)[: -LOOKED_AT - 1 : -1] if outputs.is_dir() else ():
        tags, summary = read_json(folder / "provenance.json"), read_json(folder / "summary.json")
        tokens, flops, ranks = summary.number("tokens"), summary.number("flops"), tags.text("ranks")
        if not (tokens and flops and ranks.isdigit() and int(ranks) and _same(of, tags.text("device"))):
            continue
        distance = abs(math.log(flops / tokens / flops_per_token))
        if distance < nearest and (speed := _speed(folder)):
            nearest = distance
            tflops = speed * flops / tokens / int(ranks) / 1e12
            shown = f"{tflops:.3g} TFLOP/s a device, measured in {_shown(folder)}"
            best = Rate(tflops, shown)
    return best


def _same(of: Case, device: str) -> bool:
    """Whether a recorded device is of the kind that a case has."""
    if of.device.kind == "cpu":
        return device == device_name("cpu")
    if of.device.visible:
        return device == of.device.name
    return (
        not of.device.name.endswith("GiB")
        and (card := card_of(device)) is not None
        and card == of.device.card
    )


def _speed(folder: Path) -> float:
    """Returns the tokens a second of a run, the work of recomputed layers counted as more tokens; 0 where
    nothing was logged."""
    rows, _ = metric_rows(folder / "metrics.jsonl")
    speeds = []
    for row in rows:
        tokens, mfu, hfu = (row.get(f"speed/{name}") for name in ("tokens_per_second", "mfu", "hfu"))
        if isinstance(tokens, int | float) and tokens > 0:
            speeds.append(tokens * (hfu / mfu if mfu and hfu else 1.0))
    return statistics.median(speeds[1:] or speeds) if speeds else 0.0


def _shown(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
