"""The first difference of two runs of one config, bit by bit.

By step; within a step: the batches of every rank, losses, gradient norm, task weights and learning rate,
validation, all else that is logged. Then the parameters of final/ and the resume state of the last step, with
what the loss mode has learned and the random states.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.run_folder import metric_rows
from mft.training import trace
from mft.training.checkpoint import newest
from mft.training.metrics import CLOCKED

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

ORDER = ("train/loss", "train/router", "grad_norm", "train/weight/", "lr", "valid/")
"""Beginnings of the names of metrics that are compared first; the others follow."""

ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """A value that two runs do not share."""

    what: str
    """Of which value: the name of a metric, "batches", a file and a parameter."""
    uninterrupted: str
    """The value, as a hex float or a digest."""
    resumed: str
    step: int | None = None
    """None for what is there at the end of a run alone."""
    rank: int | None = None
    """None for what is summed over the ranks."""

    def __str__(self) -> str:
        step = [] if self.step is None else [f"step {self.step}"]
        rank = [] if self.rank is None else [f"rank {self.rank}"]
        values = f"{self.uninterrupted} uninterrupted, {self.resumed} resumed"
        return f"{', '.join([*step, *rank, self.what])}: {values}"


def first_difference(uninterrupted: Path, resumed: Path) -> Difference | None:
    """Returns the first difference of two finished runs, given by their folders; None: there is none."""
    places = (in_steps, in_tensors, in_memory)
    return next(chain.from_iterable(differences(uninterrupted, resumed) for differences in places), None)


def in_steps(uninterrupted: Path, resumed: Path) -> Iterator[Difference]:
    """Yields the differences of what the steps were given and what they logged, in the order of the steps."""
    traces, logs = [trace.read(run) for run in (uninterrupted, resumed)], []
    for rank in sorted({*traces[0], *traces[1]}):
        steps = [[step for step, _ in each.get(rank, [])] for each in traces]
        for one, two in zip_longest(*steps):  # a run that began anew has steps twice
            if one != two:
                yield Difference("step trained", str(one or ABSENT), str(two or ABSENT), one or two, rank)
    for run in (uninterrupted, resumed):
        logs.append(logged(run))
    batches = [{rank: dict(lines) for rank, lines in each.items()} for each in traces]
    for step in sorted({*logs[0], *logs[1]}):
        for rank in sorted(batches[0]):
            one, two = (each[rank].get(step, ABSENT) for each in batches)
            if one != two:
                yield Difference("batches", one, two, step, rank)
        rows = [log.get(step, {}) for log in logs]
        for name in sorted({*rows[0], *rows[1]}, key=place):
            one, two = (shown(row[name]) if name in row else ABSENT for row in rows)
            if one != two:
                yield Difference(name, one, two, step)


def logged(run: Path) -> dict[int, dict[str, Any]]:
    """Returns {step: {metric: value}} of a run, without what depends on the clock."""
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for row in metric_rows(run / "metrics.jsonl")[0]:
        left_out = ("step", *CLOCKED)
        found[row["step"]] |= {name: value for name, value in row.items() if not name.startswith(left_out)}
    return found


def place(name: str) -> tuple[int, str]:
    """Returns where a metric stands in the order of comparison."""
    return next((number for number, first in enumerate(ORDER) if name.startswith(first)), len(ORDER)), name


def shown(value: Any) -> str:
    """Returns a number so that two of them are equal exactly where their bits are."""
    return value.hex() if isinstance(value, float) else repr(value)


def in_tensors(uninterrupted: Path, resumed: Path) -> Iterator[Difference]:
    """Yields the differences of the final parameters, then of the last step's resume state: its trained
    parameters, then what the optimizer keeps."""
    folders = [[run / "final", *states(run)] for run in (uninterrupted, resumed)]
    for one, two in zip_longest(*folders):
        places = [
            str(folder.relative_to(run)) if folder else ABSENT
            for folder, run in ((one, uninterrupted), (two, resumed))
        ]
        if places[0] != places[1]:
            yield Difference("the last checkpoint", places[0], places[1])
        if one is None or two is None:
            continue
        names = {file.name for folder in (one, two) for file in folder.glob("*.safetensors")}
        for name in sorted(names):
            about = (one / name).relative_to(uninterrupted)
            first, second = ((folder / name).exists() for folder in (one, two))
            if first and second:
                yield from in_file(one / name, two / name, str(about))
            else:
                yield Difference(str(about), presence(first), presence(second))


def in_memory(uninterrupted: Path, resumed: Path) -> Iterator[Difference]:
    """Yields the differences of what the loss mode has learned and of the random states, at the last step."""
    import torch

    for one, two in zip(states(uninterrupted), states(resumed), strict=True):
        for name in sorted({file.name for folder in (one, two) for file in folder.glob("*.pt")}):
            about = (one / name).relative_to(uninterrupted)
            loaded = [torch.load(folder / name, weights_only=True) for folder in (one, two)]
            first, second = (dict(leaves(value)) for value in loaded)
            for key in sorted({*first, *second}):
                values = [each.get(key, ABSENT) for each in (first, second)]
                if all(map(torch.is_tensor, values)):
                    if found := in_tensor(*values):
                        yield Difference(f"{about}{key}{found[0]}", found[1], found[2])
                elif shown(values[0]) != shown(values[1]):
                    yield Difference(f"{about}{key}", shown(values[0]), shown(values[1]))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (where it is, tensor or plain value) of all that a value of dicts and lists holds."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in items:
            yield from leaves(part, f"{key}/{name}")
    else:
        yield key, value


def presence(there: bool) -> str:
    """Returns how it is said whether something is there."""
    return "there" if there else ABSENT


def states(run: Path) -> list[Path]:
    """Returns the folder of the newest resume state, if there is one."""
    checkpoint = newest(run)
    return [] if checkpoint is None else [checkpoint / "state"]


def in_file(one: Path, two: Path, about: str) -> Iterator[Difference]:
    """Yields the differences of two files of tensors. about: how they are named."""
    from safetensors import safe_open

    with safe_open(str(one), "pt") as first, safe_open(str(two), "pt") as second:
        keys = [set(file.keys()) for file in (first, second)]
        for key in sorted(keys[0] | keys[1], key=lambda key: ("/" in key, key)):
            what = f"{about} {parameter(first if key in keys[0] else second, key)}"
            if not (key in keys[0] and key in keys[1]):
                yield Difference(what, presence(key in keys[0]), presence(key in keys[1]))
            elif found := in_tensor(first.get_tensor(key), second.get_tensor(key)):
                yield Difference(f"{what}{found[0]}", found[1], found[2])


def parameter(file: safe_open, key: str) -> str:
    """Returns what a tensor of a file is called: in a resume state its key is the number of a shard, which
    the file names, and what the optimizer keeps for it."""
    number, _, kept = key.partition("/")
    pieces = json.loads((file.metadata() or {}).get("pieces", "[]"))
    if not number.isdigit() or int(number) >= len(pieces):
        return key
    return pieces[int(number)]["name"] + (f", {kept} of the optimizer" if kept else "")


def in_tensor(one: torch.Tensor, two: torch.Tensor) -> tuple[str, str, str] | None:
    """Returns ([index], value, value) of the first element with other bits, None where there is none."""
    import torch

    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return "", f"{one.dtype} {tuple(one.shape)}", f"{two.dtype} {tuple(two.shape)}"
    flat = [tensor.contiguous().reshape(-1) for tensor in (one, two)]
    differing = flat[0].view(torch.uint8) != flat[1].view(torch.uint8)
    if not differing.any():
        return None
    index = int(differing.nonzero()[0]) // one.element_size()
    first, second = (shown(tensor[index].item()) for tensor in flat)
    return f"[{index}]", first, second
