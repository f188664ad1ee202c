"""Where a step's time goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.stage import Stage
from tests.gpu.children import Found, Place

TOP, STEPS = 15, 2


def kernels(events: Iterable[Any]) -> list[Any]:
    """Returns the events of a GPU: what the host does has the time of its kernels as well, and so have marked
    stretches such as the optimizer's step."""
    return [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]


def profiled(place: Place) -> Found:
    """The kernels of two steps that take longest, the share of time in which the device is idle, in copies."""
    stage = Stage("7B", "lora", place)
    stage.time("P")
    gpu = place.device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    with profile(activities=activities) as seen:
        marked = stage.train("P", STEPS)
    whole = sum(marked.clock.milliseconds())
    events = kernels(seen.key_averages()) if gpu else list(seen.key_averages())
    times = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1000 for e in events}
    longest = sorted(times, key=lambda name: -times[name])[:TOP]
    copies = [e for e in seen.key_averages() if e.key == "aten::_to_copy"]
    casts = sum(e.device_time_total if gpu else e.cpu_time_total for e in copies)
    found = Found({name[:80]: round(times[name], 2) for name in longest})
    found.values |= {
        "milliseconds of the steps": round(whole, 2),
        "idle share": round(1 - sum(times.values()) / whole, 3),
        "share of casts": round(casts / 1000 / whole, 3),
        "kernels of a step": sum(e.count for e in events) / STEPS,
    }
    if gpu:
        found.holds(found.values["idle share"] <= 0.05, "the device is idle for more than 5 % of the time")
    return found
