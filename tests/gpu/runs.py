"""Whole runs of one model on one set of data, each in the child that first asks for it, and how far two of them
are apart."""

from __future__ import annotations

import json
import os
import random
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.distributed.equality import START, relative
from tests.distributed.runs import frozen, largest, logged, play, weights, worst
from tests.gpu.children import Place

MODEL = (
    "model.hidden_size=256",
    "model.layers=4",
    "model.heads=8",
    "model.kv_heads=4",
    "model.intermediate_size=704",
    "model.vocab_size=4096",
)
"""A llama of 5 million weights, 4 of them in layers."""

RATES = {"full": "optimizer.lr=1e-3", "lora": "optimizer.lr=1e-2", "qlora": "optimizer.lr=1e-2"}

LAYOUTS = {
    "pack": ("data=pack", "train.per_device_batch_size=2", "train.global_batch_size=4"),
    "pad": ("data=pad", "train.per_device_batch_size=8", "train.global_batch_size=16"),
}
"""Two micro-batches in a step."""

TASKS, ROWS = ("alpha", "beta", "gamma", "delta", "epsilon"), 40

ASKED = ("What comes after one?", "def add(a, b):", "x")


@dataclass(frozen=True)
class Case:
    """A run."""

    peft: str = "lora"
    dist: str = "single"
    precision: str = "fp32"
    layout: str = "pack"
    more: tuple[str, ...] = ()
    """Further overrides."""
    label: str = ""
    """Tells it from cases that differ in `more`."""
    on_cpu: bool = False
    """Whether it is a reference of the CPU."""

    @property
    def name(self) -> str:
        """What its folder is called."""
        where = "cpu" if self.on_cpu else ""
        return " ".join(filter(None, (where, self.dist, self.peft, self.precision, self.layout, self.label)))


def data(place: Place) -> list[Path]:
    """Returns the folders of five tasks with answers of 1 to 360 letters (`small`: 24), written once."""
    folders = [place.folder / "tasks" / name for name in TASKS]
    for number, folder in enumerate(folders):
        if (folder / "rows.jsonl").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        draw, longest = random.Random(number), 24 if place.small else 360
        lines = []
        for row in range(ROWS):
            answer = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, longest)))
            turns = [{"role": "human", "content": f"{row}"}, {"role": "bot", "content": answer}]
            lines.append(json.dumps({"chat_rounds": turns}))
        write(folder / "rows.jsonl", lines)
    return folders


def write(path: Path, lines: list[str]) -> None:
    """Writes a file of lines, complete at once: references beside this cell write and read the same."""
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_text("\n".join(lines) + "\n")
    new.rename(path)


def prompts(place: Place) -> tuple[str, ...]:
    """Returns the overrides by which a run answers prompts; all ids of its vocabulary are tokens."""
    path = place.folder / "prompts.jsonl"
    turns = ([{"role": "human", "content": text}, {"role": "bot", "content": ""}] for text in ASKED)
    write(path, [json.dumps({"chat_rounds": turn}) for turn in turns])
    return (f"train.prompts={path}", "train.prompts_max_new_tokens=16", "model.vocab_size=320")


def settings(place: Place) -> list[str]:
    """Returns the overrides that all runs share, whether in a child or by the command line."""
    return [
        *MODEL,
        f"cache_dir={place.folder / 'cache'}",
        f"data.paths=[{','.join(map(str, data(place)))}]",
        f"data.seq_length={128 if place.small else 1024}",
        "train.sample_losses=none",
        # a CPU has no peak that is known
        *(["train.peak_tflops=1"] if place.device == "cpu" else []),
    ]


@contextmanager
def group(place: Place) -> Iterator[None]:
    """Context with a process group of one, for several runs in one child: DeepSpeed keeps to the first that it
    has seen."""
    kinds = "cpu:gloo,cuda:nccl" if place.device == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(kinds, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def played(case: Case, place: Place) -> Path:
    """Returns the folder of a finished run; plays it unless another cell has."""
    folder = place.folder / "runs" / case.name.replace(" ", "-")
    if (folder / "summary.json").is_file():
        return folder
    if case.on_cpu and torch.cuda.is_available():
        raise AssertionError(f"the reference {case.name} has not ended")
    given = [
        *settings(place),
        f"train.max_steps={3 if place.small else 20}",
        "train.eval_every=null",
        "train.eval_at_start=false",
        f"train.precision={case.precision}",
        f"peft={case.peft}",
        RATES[case.peft],
        f"dist={case.dist}",
        "launch.nproc=1",
        *(["dist.persistence_threshold=0"] if case.dist == "zero3" else []),
        *LAYOUTS[case.layout],
        *case.more,
    ]
    play([frozen(folder, given)])
    return folder


def apart(one: Path, two: Path) -> dict[str, float]:
    """Returns the largest absolute differences of the first loss, all losses and final weights, and the
    largest relative one of gradient norms."""
    losses = [logged(folder, "train/loss") for folder in (one, two)]
    norms = zip(logged(one, "grad_norm"), logged(two, "grad_norm"), strict=True)
    first, second = weights(one / "final"), weights(two / "final")
    assert first.keys() == second.keys()
    return {
        "first loss": abs(losses[0][0] - losses[1][0]),
        "losses": largest(*losses),
        "norms": worst(abs(a - b) / abs(a) for a, b in norms),
        "weights": worst(float((value - second[name]).abs().max()) for name, value in first.items()),
    }


def updates_apart(one: Case, two: Case, place: Place) -> dict[str, float]:
    """Returns the largest relative differences of losses, norms and the whole update."""
    start = Case(one.peft, "single", one.precision, one.layout, (*one.more, *START), "start")
    return relative(*(played(case, place) for case in (one, two, start)))
