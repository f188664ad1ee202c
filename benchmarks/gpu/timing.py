"""Times and peaks of steps, and the table of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mft.batch import StepBatches
from mft.training.memory import PeakMemory
from mft.training.metrics import PEAKS
from mft.training.phases import Phase
from mft.training.trainer import StepSource
from tests.gpu.children import Place

WARM_UP, STEPS = 3, 11
"""Steps that warm up, and all of them."""


def number_of_steps(place: Place) -> tuple[int, int]:
    """Returns how many steps warm up, and all; few where the script is tried."""
    return (1, 3) if place.small else (WARM_UP, STEPS)


class Clock:
    """Moments of a device: events in its stream on a GPU, which take the time of kernels and of gaps."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Notes this moment; the host does not wait."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Returns the time between each two marks."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [one.elapsed_time(two) for one, two in pairs]
        return [1000 * (two - one) for one, two in pairs]


@dataclass
class Marked:
    """Steps of a source, with a mark before each and after the last; steps that warm up count in no peak."""

    source: StepSource
    clock: Clock
    memory: PeakMemory
    warm_up: int
    tokens: int = field(default=0)

    def steps(self, epoch: int = 0, rows_consumed: int = 0, count: int = STEPS) -> Generator[StepBatches]:
        """See `StepSource`."""
        for number, data in enumerate(self.source.steps(epoch, rows_consumed, count)):
            if number == self.warm_up:
                self.memory.close("warming up")
            self.clock.mark()
            self.tokens = sum(batch.layout.tokens for batch in data.batches)
            yield data
        self.clock.mark()


def measured(place: Place, call: Callable[[], object], work: float = 0.0) -> dict[str, float]:
    """Returns what repeated calls take. work: FLOPs or bytes of one, for its rate in 1e12 per second."""
    clock, (warm_up, steps) = Clock(torch.device(place.device)), number_of_steps(place)
    for _ in range(steps):
        clock.mark()
        call()
    clock.mark()
    return summary(clock, warm_up, work=work)


def summary(
    clock: Clock, warm_up: int, memory: PeakMemory | None = None, tokens: int = 0, work: float = 0.0
) -> dict[str, float]:
    """Returns milliseconds as median, fastest and slowest of the timed steps, and rates."""
    times = clock.milliseconds()[warm_up:]
    middle = statistics.median(times)
    found = {"ms": middle, "fastest": min(times), "slowest": max(times)}
    if tokens:
        found["tokens_per_second"] = 1000 * tokens / middle
    if work:
        found["tera_per_second"] = work / middle / 1e9
    if memory:
        found |= {name: peak / 2**30 for name, peak in zip(PEAKS, memory.read(Phase.training), strict=False)}
    return {name: round(value, 4) for name, value in found.items()}


def or_memory(call: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Returns what a variant has measured, or that memory ran out: a fact that ends no cell."""
    try:
        return call()
    except torch.OutOfMemoryError as error:
        return {"out of memory": str(error)[:120]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def ratio(values: dict[str, Any], one: str, two: str) -> float | None:
    """Returns how many times as fast variant `one` is as `two`; None where one of them has no time."""
    if "ms" not in values.get(one, {}) or "ms" not in values.get(two, {}):
        return None
    return round(float(values[two]["ms"] / values[one]["ms"]), 3)


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Returns the variants of all cells as a Markdown table."""
    rows = [
        "| cell | variant | ms, median (fastest to slowest) | tokens/s | TFLOP/s, TB/s | peak GiB |",
        "|--" * 6 + "|",
    ]
    for line in lines:
        for name, value in (line.get("found") or {}).items():
            if not (isinstance(value, dict) and "ms" in value):
                continue
            rate, speed = value.get("tokens_per_second", 0), value.get("tera_per_second", 0)
            times = f"{value['ms']:.4g} ({value['fastest']:.4g} to {value['slowest']:.4g})"
            shown = (f"{rate:,.0f}" if rate else "", f"{speed:.4g}" if speed else "")
            peak = f"{value['peak_gib']:.4g}" if "peak_gib" in value else ""
            rows.append(f"| {line['cell']} | {name} | {times} | {' | '.join(shown)} | {peak} |")
    return "\n".join(rows)
