"""Whole runs inside ranks that are already up: what `mft train` does, without its start."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SETTINGS = (
    "model=tiny",
    "train.precision=fp32",
    "train.max_steps=20",
    "train.eval_every=10",
    "train.eval_samples=8",
    "train.save_every=null",
    "train.log_every=1",
    "train.resume=never",
    "train.max_grad_norm=0.5",
    "data.seq_length=96",
    "optimizer.lr=2e-3",
    "optimizer.eps=1e-5",  # with 1e-8 a rounding error of a gradient near 0 becomes an update of the size of lr
    "tracking=[]",
)
"""Overrides of every run: small, in exact arithmetic, every step logged, clipping in most steps."""

LAYOUTS = {
    "pad": ("data=pad", "train.per_device_batch_size=2", "train.global_batch_size=8"),
    "pack": ("data=pack", "train.per_device_batch_size=1", "train.global_batch_size=4"),
}
"""Settings of padded and of packed rows, with the same global batch on any number of ranks."""

BACKENDS = ("ddp", "zero2", "zero3", "fsdp")
FORCED = {"zero3": ["dist.persistence_threshold=0"]}
"""Tiny weights are below ZeRO-3's threshold and would stay whole."""


class Tree:
    """The runs of a test module, in a folder."""

    def __init__(self, root: Path):
        self.root = root
        self.data = [
            f"cache_dir={root / 'cache'}",
            f"data.paths=[{','.join(map(str, write_tasks(root / 'tasks')))}]",
        ]

    def folder(self, backend: str, case: str) -> Path:
        """Returns the folder of a run."""
        return self.root / f"{backend}-{case}"

    def step(self, backend: str, case: str, number: int) -> Path:
        """Returns the folder of a run's checkpoint."""
        return self.folder(backend, case) / "checkpoints" / f"step-{number}"

    def frozen(
        self, backend: str, case: str, overrides: Sequence[str], ranks: int = 2, start: Path | None = None
    ) -> Path:
        """Freezes a run and returns its folder; start: a checkpoint that it is to go on from."""
        settings = [
            *self.data,
            f"dist={backend}",
            f"launch.nproc={ranks}",
            *FORCED.get(backend, []),
            *overrides,
        ]
        folder = frozen(self.folder(backend, case), settings)
        if start:
            shutil.copytree(start, folder / "checkpoints" / start.name)
        return folder


def write_tasks(folder: Path) -> list[Path]:
    """Writes two tasks of short conversations of very different lengths; returns their folders."""
    words = [
        "def",
        "add",
        "return",
        "value",
        "list",
        "of",
        "names",
        "for",
        "in",
        "range",
        "import",
        "test",
        "the",
    ]
    paths = []
    for task in ("left", "right"):
        path = folder / task
        path.mkdir(parents=True)
        lines = []
        for i in range(48):
            ask = " ".join(words[(i * 7 + k) % len(words)] for k in range(2 + i % 5))
            say = " ".join(
                words[(i * 3 + k * (2 if task == "left" else 5)) % len(words)]
                for k in range(1 + (i * i) % 13)
            )
            turns = [{"role": "human", "content": ask}, {"role": "bot", "content": say}]
            lines.append(json.dumps({"chat_rounds": turns}))
        (path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        paths.append(path)
    return paths


def frozen(run_dir: Path, overrides: Sequence[str]) -> Path:
    """Composes and checks a run, writes its config into `run_dir` and returns that."""
    from mft.config.compose import compose_resolved
    from mft.config.schema import freeze
    from mft.launch import job

    settings = [*SETTINGS, *overrides]
    cfg = job.checked(compose_resolved(settings), settings).cfg
    cfg.output_dir = str(run_dir)
    freeze(cfg, run_dir / "config.yaml")
    return run_dir


def play(run_dirs: Sequence[Path]) -> None:
    """Runs each frozen run in this rank, silently and without the pictures of its losses, which take longer
    than its steps."""
    from omegaconf import OmegaConf

    from mft.run import run
    from mft.training import plots

    plots.loss_curves = plots.task_weights = lambda *paths: None  # type: ignore[assignment]

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for run_dir in run_dirs:
            status = run(OmegaConf.load(run_dir / "config.yaml"), run_dir, lambda: False)  # type: ignore[arg-type]
            assert status == "finished"
            gc.freeze()  # what the run has imported, or the collector walks over it at the end of every further run


def logged(run_dir: Path, name: str) -> list[float]:
    """Returns the values of one metric, in the order of steps."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def weights(folder: Path) -> dict[str, Any]:
    """Returns the tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def largest(one: Sequence[float], two: Sequence[float]) -> float:
    """Returns the largest difference of two series of the same length."""
    return worst(abs(a - b) for a, b in zip(one, two, strict=True))


def worst(values: Iterable[float]) -> float:
    """Returns the largest value; nan if one is, which `max` may pass over."""
    return max(values, key=lambda value: (value != value, value))
