"""Pairs of runs that must be alike: on GPU and CPU (A1, A2), on each backend and in one process (A5), with and
without offloading (A7); fp16 and its loss scaler (A6); what runs tell of themselves (A13)."""

from __future__ import annotations

import gc
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mft.errors import UserError
from mft.files.json_file import read_json
from tests.distributed.equality import DESCENT
from tests.distributed.runs import logged
from tests.distributed.test_descent import BF16
from tests.gpu.children import Cell, Found, Place
from tests.gpu.runs import Case, apart, group, played, prompts, updates_apart

PEFTS = ("full", "lora", "qlora")
SHARDING = ("ddp", "zero2", "zero1", "zero3", "fsdp")
QUICK = {("fsdp", "qlora")}
"""Their twins are played by `make test`; on a CPU tests/distributed/test_backends.py holds the same of every
backend and peft mode."""

OTHER_DEVICE = {"first loss": 1e-5, "losses": 5e-4, "norms": 1e-3}
"""Of fp32 on a GPU and on a CPU, which add up in another order; so has a step more of it than the first. Two
kinds of CPU code (AVX-512, SSE) are 7e-7 apart in 20 losses and 1.2e-5 in norms; of a norm see below."""
OTHER_PRECISION = {"first loss": 5e-3, "losses": 3e-2}
SAME_PRECISION = {"losses": 2e-2}
OTHER_BACKEND = {"losses": 1e-5, "norms": 1e-4, "weights": 1e-4}
"""Of fp32 on one device."""


def alike(one: Case, two: Case, bounds: dict[str, float], place: Place) -> Found:
    """Two runs within bounds."""
    found = Found(apart(played(one, place), played(two, place)))
    found.below(bounds)
    found.holds(all(map(math.isfinite, found.values.values())), "a difference is not finite")
    return found


def alike_in_bf16(one: Case, two: Case, place: Place) -> Found:
    """Two runs whose optimizer is gradient descent, within the bounds of docs/distribution.md."""
    found = Found(updates_apart(one, two, place))
    found.below(BF16)
    return found


def reference(case: Case) -> Cell:
    """The run of a CPU beside which a GPU's is held."""

    def run(place: Place) -> Found:
        return Found({"loss": logged(played(case, place), "train/loss")[-1]})

    return Cell(f"reference {case.name}", run, 300, on_cpu=True)


def beside_cpu(name: str, one: Case, two: Case, bounds: dict[str, float], twin: str) -> Cell:
    """A cell that holds a GPU's run beside a CPU's."""
    return Cell(name, partial(alike, one, two, bounds), 60, twin, after=(f"reference {two.name}",))


EXACT = {(p, rows): Case(p, layout=rows, on_cpu=True) for p in PEFTS for rows in ("pack", "pad")}
ROUNDED = {p: Case(p, precision="bf16", on_cpu=True) for p in PEFTS}
REFERENCES = [reference(case) for case in (*EXACT.values(), *ROUNDED.values())]

ON_CPU = [
    *(
        beside_cpu(
            f"A1 {p} {rows}",
            Case(p, layout=rows),
            case,
            OTHER_DEVICE,
            "long",
        )
        for (p, rows), case in EXACT.items()
    ),
    *(
        beside_cpu(f"A2 {p} fp32", Case(p, precision="bf16"), EXACT[p, "pack"], OTHER_PRECISION, "long")
        for p in PEFTS
    ),
    *(
        beside_cpu(f"A2 {p} bf16", Case(p, precision="bf16"), case, SAME_PRECISION, "long")
        for p, case in ROUNDED.items()
    ),
]


def on(dist: str, peft: str, precision: str, more: tuple[str, ...] = (), label: str = "") -> Case:
    """The run of a backend; zero1 is a stage of zero2."""
    if dist == "zero1":
        dist, more, label = "zero2", ("dist.stage=1", *more), f"stage1 {label}".strip()
    return Case(peft, dist, precision, more=more, label=label)


def backend(dist: str, peft: str, precision: str) -> Cell:
    """A backend in a group of one against a single process on the same device."""
    name, twin = f"A5 {dist} {peft} {precision}", "long"
    if precision == "fp32":
        twin = "quick" if (dist, peft) in QUICK else "long"

        def run(place: Place) -> Found:
            return alike(Case(peft), on(dist, peft, precision), OTHER_BACKEND, place)

        return Cell(name, run, twin=twin)
    more = (*DESCENT, "data=pack", "train.per_device_batch_size=2", "train.global_batch_size=4")
    one, two = (on(d, peft, precision, more, "descent") for d in ("single", dist))
    return Cell(name, partial(alike_in_bf16, one, two), 90, twin)


BACKENDS = [
    *(backend(dist, peft, "fp32") for dist in SHARDING for peft in PEFTS),
    *(backend(dist, peft, "bf16") for dist in SHARDING for peft in ("lora", "qlora")),
]


def scaled(case: Case, place: Place) -> Found:
    """A run in fp16 whose loss scaler begins so high that gradients overflow: skipped until they do not."""
    from mft.distributed.engine import Engine

    scalers: list[Any] = []
    prepare = Engine.prepare

    def from_high(engine: Engine, module: Any, optimizer: Any) -> Any:
        if place.device == "cpu":
            # it computes in fp32: gradients are rounded to fp16, whose range they leave
            engine.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)  # type: ignore[assignment]
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: gradient.half().to(gradient.dtype))
        elif scaler := engine.accelerator.scaler:  # DeepSpeed's is in its config
            scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**28})
        scalers.append(engine.accelerator.scaler)
        prepared = prepare(engine, module, optimizer)
        if place.device == "cpu":  # by which accelerate unscales
            engine.accelerator.state._mixed_precision, engine.accelerator.native_amp = "fp16", True
        return prepared

    Engine.prepare = from_high  # type: ignore[method-assign]
    folder = played(case, place)
    skipped, losses = sum(logged(folder, "train/skipped_steps")), logged(folder, "train/loss")
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    found = Found({"skipped": skipped, "first": finite[0], "last": finite[-1]})
    found.holds(0 < skipped < 15, f"{skipped:g} of 20 steps were skipped, where some were expected")
    found.holds(finite[-1] < finite[0], "the loss has not fallen after the overflows")
    if scalers[0] is not None:
        found.values["scale"] = scale = scalers[0].get_scale()
        found.holds(scale < 2.0**28, "the scale is not lower")
    return found


def infinite(place: Place) -> Found:
    """A loss that is not finite is an error also under a loss scaler, and names its samples."""
    case = half_precision(
        "full", "single", place.device, ("optimizer.lr=1e38", "scheduler=constant"), "infinite"
    )
    try:
        played(case, place)
    except UserError as error:
        found = Found({"said": str(error)[:300]})
        found.holds("not finite" in str(error) and "rows.jsonl" in str(error), "it names no sample")
        return found
    return Found(missed=["a run with lr=1e38 has ended without an error"])


def half_precision(peft: str, dist: str, device: str, more: tuple[str, ...] = (), label: str = "") -> Case:
    """A run in fp16, on a CPU in fp32."""
    steps = ("train.max_steps=20", *more)
    return Case(peft, dist, "fp16" if device == "cuda" else "fp32", more=steps, label=label or "scaled")


def fp16(peft: str, dist: str, twin: str, more: tuple[str, ...] = ()) -> Cell:
    """A cell of `scaled`."""

    def run(place: Place) -> Found:
        return scaled(half_precision(peft, dist, place.device, more), place)

    return Cell(f"A6 {dist} {peft}", run, twin=twin)


FP16 = [
    fp16("lora", "single", "long"),
    fp16("full", "single", "long"),
    fp16("full", "fsdp", "long"),
    fp16("full", "zero2", "", ("+dist.config.fp16.initial_scale_power=28",)),
    Cell("A6 infinite", infinite),
]


def offloaded(dist: str, setting: str, place: Place) -> Found:
    """A backend with parts in the CPU's memory against the same one without, and its answers."""
    asked = prompts(place)
    more = (*asked, f"dist.{setting}=true")
    with group(place):
        one, first = with_peak(Case("full", dist, more=asked, label="asked"), place)
        two, second = with_peak(Case("full", dist, more=more, label=f"asked {setting}"), place)
    found = Found(apart(one, two))
    found.below(OTHER_BACKEND)
    peaks = [first, second]
    found.values |= {"peak_gib": peaks}
    found.holds(answers(one) == answers(two), "the answers differ")
    found.holds(place.device == "cpu" or peaks[1] < peaks[0], "it takes no less memory of the device")
    return found


def with_peak(case: Case, place: Place) -> tuple[Path, float]:
    """Returns a run's folder and its peak in GiB, without what an earlier run of this process still holds:
    ZeRO-3 keeps its weights."""
    gc.collect()
    held = torch.cuda.memory_allocated() if place.device == "cuda" else 0
    folder = played(case, place)
    return folder, max(logged(folder, "memory/peak_gib")) - held / 2**30


def answers(run_dir: Path) -> list[Any]:
    """Returns a run's answers, each with its prompt."""
    table = read_json(run_dir / "report" / "answers.json")
    return list(table["data"])


OFFLOADED = [
    Cell(f"A7 {dist} {setting}", partial(offloaded, dist, setting), 90, twin)
    for dist, setting, twin in (
        ("fsdp", "offload", "long"),
        ("zero2", "offload_optimizer", "long"),
        ("zero3", "offload_optimizer", "long"),
        ("zero3", "offload_parameters", "long"),
    )
]


def told(place: Place) -> Found:
    """Speed, MFU and peak memory are logged on every backend; a frozen weight counts the same however held."""
    found, flops = Found(), {}
    cases = [(dist, peft) for dist in (SHARDING[:1] if place.small else SHARDING) for peft in PEFTS]
    with group(place):
        folders = {case: played(on(*case, "fp32"), place) for case in cases}
    for dist in dict.fromkeys(dist for dist, _ in cases):
        for peft in PEFTS:
            folder = folders[dist, peft]
            flops[dist, peft] = logged(folder, "total/flops")[-1] / logged(folder, "total/tokens")[-1]
            for name in ("speed/mfu", "memory/peak_gib", "speed/tokens_per_second"):
                found.holds(logged(folder, name)[-1] > 0, f"{dist} {peft} has no {name}")
        found.holds(flops[dist, "lora"] == flops[dist, "qlora"], f"{dist}: flops of lora and qlora differ")
    found.values["flops_per_token"] = {" ".join(key): value for key, value in flops.items()}
    return found


TOLD = [Cell("A13 told", told, 120)]
