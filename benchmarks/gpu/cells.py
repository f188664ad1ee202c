"""The cells of speed, in the order in which minutes are best spent. What is held is a ratio of two variants of one
cell, on a GPU alone; absolute speeds are reported only."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from benchmarks.gpu import models
from benchmarks.gpu.plain import Plain
from benchmarks.gpu.profile import profiled
from benchmarks.gpu.roofline import roofline
from benchmarks.gpu.stage import Stage
from benchmarks.gpu.timing import ratio
from mft.training.memory import Resident
from tests.gpu.children import Cell, Found, Place
from tests.gpu.runs import group

CARD = "clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active"
"""What explains that a card is slower than it was."""


def described(run: Callable[[Place], Found], place: Place) -> Found:
    """Returns what a cell has found, with how its card was at the end."""
    found = run(place)
    if place.device == "cuda":
        with suppress(OSError):
            asked = ["nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"]
            found.values["card"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return found


def at_least(found: Found, place: Place, one: str, two: str, bound: float) -> None:
    """Tells how many times as fast one variant is as another; holds it on a GPU."""
    value = found.values[f"{one} : {two}"] = ratio(found.values, one, two)
    if place.device == "cuda":
        found.holds(
            value is not None and value >= bound, f"{one} is {value} x as fast as {two}, {bound} expected"
        )


def loading(place: Place) -> Found:
    """Writing 13.5 GB and reading them onto the device."""
    began = time.perf_counter()
    models.folder("7B", place)
    written = time.perf_counter()
    Stage("7B", "lora", place).close()
    seconds = time.perf_counter() - written
    found = Found({"write_seconds": round(written - began, 2), "load_seconds": round(seconds, 2)})
    found.values["host_gib"] = Resident().read()[0] / 2**30
    if place.device == "cuda":
        found.below({"load_seconds": 25})
    return found


def lora(place: Place) -> Found:
    """7B LoRA: recomputation, samples in a row, kernels of attention."""
    stage, found = Stage("7B", "lora", place), Found()
    for kind in ("P", "O"):
        found.values[f"on {kind}"] = stage.time(kind, checkpointing=True)
        found.values[f"off {kind}"] = stage.time(kind)
    found.values["off M"] = stage.time("M")
    found.values["off P sdpa"] = stage.time("P", fast=False)
    at_least(found, place, "off P", "on P", 1.2)
    at_least(found, place, "off P", "off P sdpa", 1.0)
    return found


def beside_plain(place: Place) -> Found:
    """7B LoRA and the plain loop, one after the other."""
    stage, found = Stage("7B", "lora", place), Found()
    for kind in ("O", "P"):
        found.values[f"mft {kind}"] = stage.time(kind)
    stage.close()
    plain = Plain("7B", "lora", place)
    found.values["plain O"] = plain.time("O")
    found.values["plain P mask"] = plain.time("P")
    found.values["plain P padded"] = plain.time("P", padded=True, checkpointing=True)
    at_least(found, place, "mft O", "plain O", 1.05)
    at_least(found, place, "mft P", "plain P mask", 1.3)
    return found


def qlora(place: Place) -> Found:
    """7B QLoRA beside LoRA, and what it takes to quantise while loading."""
    stage, found = Stage("7B", "lora", place), Found()
    found.values["lora on P"] = stage.time("P", checkpointing=True)
    stage.close()
    began = time.perf_counter()
    stage = Stage("7B", "qlora", place)
    found.values["load_seconds"] = round(time.perf_counter() - began, 2)
    found.values["on P"] = stage.time("P", checkpointing=True)
    found.values["off P"] = stage.time("P")
    at_least(found, place, "on P", "lora on P", 0.9)
    if place.device == "cuda":
        found.holds(found.values["on P"].get("peak_gib", 99) <= 9, "more than 9 GiB with recomputation")
    return found


def full(place: Place) -> Found:
    """1.2B, all weights: a single process, fsdp, positions of one chunk of logits, the plain loop."""
    from mft.distributed.fsdp import Fsdp

    found = Found()
    few, many = (16, 64) if place.small else (261, 2048)
    for name, backend, rows in (
        ("single", None, None),
        ("rows few", None, few),
        ("rows many", None, many),
        ("fsdp", Fsdp(), None),
    ):
        stage = Stage("1.2B", "full", place, backend, rows)
        found.values[name] = stage.time("P")
        stage.close()
    found.values["plain"] = Plain("1.2B", "full", place).time("P")
    at_least(found, place, "rows many", "rows few", 1.1)
    at_least(found, place, "single", "plain", 1.1)
    at_least(found, place, "fsdp", "single", 1.0)
    return found


def backends(place: Place) -> Found:
    """1.2B LoRA on every backend in a group of one, one after the other."""
    from mft.distributed.ddp import Ddp, Single
    from mft.distributed.deepspeed import Zero2, Zero3
    from mft.distributed.fsdp import Fsdp

    found = Found()
    kinds = {"single": Single, "ddp": Ddp, "fsdp": Fsdp, "zero2": Zero2, "zero3": Zero3}
    with group(place):
        for name, kind in kinds.items():
            stage = Stage("1.2B", "lora", place, kind())
            found.values[name] = stage.time("P")
            stage.close()
    for name, slower in {"ddp": 1.05, "zero2": 1.15, "fsdp": 1.15, "zero3": 1.5}.items():
        at_least(found, place, name, "single", 1 / slower)
    return found


def small(place: Place) -> Found:
    """135M LoRA, whose kernels are shorter than their launches."""
    return Found({"off P": Stage("135M", "lora", place).time("P")})


CHOSEN: dict[str, tuple[Callable[[Place], Found], int]] = {
    "B0 roofline": (roofline, 40),
    "B1 loading": (loading, 90),
    "B2 lora": (lora, 120),
    "B3 plain": (beside_plain, 120),
    "B4 qlora": (qlora, 120),
    "B5 full": (full, 120),
    "B6 backends": (backends, 120),
    "B7 small": (small, 60),
    "B8 profile": (profiled, 60),
}
"""Name of a cell → what it does, and how many seconds it may take."""

QUICK = ("B0", "B2")
CELLS: list[Cell] = [
    Cell(name, partial(described, run), seconds, "quick" if name.startswith(QUICK) else "long")
    for name, (run, seconds) in CHOSEN.items()
]
