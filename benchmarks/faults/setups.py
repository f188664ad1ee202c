"""The configs of a campaign, and what is made once for each: a run without a fault, and one that was killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.processes import Command, end_all

STEPS = 8
EVERY = 2
"""Steps between two validations, and two checkpoints."""

COMMON = (
    "debug=fast",
    f"train.max_steps={STEPS}",
    f"train.save_every={EVERY}",
    f"train.eval_every={EVERY}",
    "optimizer.lr=1e-2",
    "data.split=[80,10,10]",
)
BACKENDS = {"single": 1, "ddp": 2, "zero2": 2, "zero3": 2, "fsdp": 2}
"""Backend → ranks."""
DEALT = (
    "single",
    "ddp",
    "single",
    "ddp",
    "single",
    "zero2",
    "single",
    "ddp",
    "fsdp",
    "single",
    "ddp",
    "zero3",
)
"""Backends of the setups of a campaign."""
LOSSES = [
    "task_token_mean",
    "token_mean",
    "coba",
    "famo",
    "famo_valid",
    "dwa",
    "uncertainty",
    "lbtw",
    "sample_mean",
    "task_sample_mean",
    "task_focal",
    "sample_focal",
    "self_paced",
]


@dataclass(frozen=True)
class Setup:
    """What is trained: a backend with its ranks, a peft mode, a layout and a loss mode."""

    dist: str = "single"
    peft: str = "lora"
    layout: str = "pad"
    loss: str = "task_token_mean"

    @property
    def name(self) -> str:
        """A name for people and for folders."""
        return f"{self.dist}-{self.peft}-{self.layout}-{self.loss}"

    def overrides(self) -> list[str]:
        """Returns the overrides of `mft train`, without data and output_dir."""
        dropout = ["peft.dropout=0.1"] if self.peft == "lora" else []
        chosen = [f"dist={self.dist}", f"peft={self.peft}", f"data={self.layout}", f"loss={self.loss}"]
        return [*COMMON, *chosen, *dropout, f"launch.nproc={BACKENDS[self.dist]}"]


def dealt(seed: int) -> list[Setup]:
    """Returns the setups of a campaign, a function of its seed: lora mostly, one and two ranks mostly."""
    draw = random.Random(f"setups {seed}")
    losses = draw.sample(LOSSES, len(DEALT))
    pefts = draw.sample(["full"] * 3 + ["lora"] * (len(DEALT) - 3), len(DEALT))
    layouts = [draw.choice(["pad", "pack"]) for _ in DEALT]
    return [Setup(*chosen) for chosen in zip(DEALT, pefts, layouts, losses, strict=True)]


@dataclass
class Bench:
    """Folders that all faults of a campaign share: the tasks, a warm cache, references, killed runs."""

    root: Path
    locks: dict[str, threading.Lock] = field(default_factory=dict)
    """What is made once is made under the lock of its name: faults are played side by side."""

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.cache = self.root / "cache"
        if not (self.root / "tasks").exists():
            write_tasks(self.root / "tasks")

    def lock(self, name: str) -> threading.Lock:
        """Returns the lock of something that is made once."""
        return self.locks.setdefault(name, threading.Lock())

    def data(self) -> str:
        """Returns the override that names the two tasks."""
        return data_override(self.root / "tasks")

    def command(self, arguments: list[str], work: Path, **options: object) -> Command:
        """Starts `mft ARGUMENTS` in a folder, with the warm cache."""
        variables = {"MFT_CACHE": str(self.cache)}
        return Command(arguments, work, work / "output.txt", variables, **options)  # type: ignore[arg-type]

    def train(self, setup: Setup, work: Path) -> Command:
        """Starts the training of a setup in a folder."""
        given = ["train", *setup.overrides(), self.data(), "output_dir=run", "tracking=none"]
        return self.command(given, work)

    def reference(self, setup: Setup) -> Path:
        """Returns the run folder of a setup that was trained without a fault."""
        with self.lock(setup.name):
            work = self.root / "references" / setup.name
            if not (work / "made").exists():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                command = self.train(setup, work)
                if command.wait(300) != 0:
                    end_all(work)
                    raise SystemExit(f"{setup.name} cannot be trained without a fault:\n{command.text()}")
                (work / "made").write_text(f"{command.seconds()}")
        return work / "run"

    def seconds(self, setup: Setup) -> float:
        """Returns how long its reference took."""
        return float((self.reference(setup).parent / "made").read_text())

    def killed(self, setup: Setup, work: Path) -> None:
        """Makes a copy of its run, killed for real after step 6 was saved, at work/run."""
        self.reference(setup)
        with self.lock(f"killed {setup.name}"):
            made = self.root / "killed" / setup.name
            while not (made / "made").exists():
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir(parents=True)
                command = self.train(setup, made)
                command.until((made / "run" / "checkpoints" / "step-6").is_dir)
                command.send_group(signal.SIGKILL)
                command.wait(60)
                end_all(made)
                if not (made / "run" / "final").exists():
                    (made / "made").touch()
        shutil.copytree(made / "run", work / "run", copy_function=shutil.copy2)

    def finished(self, setup: Setup, work: Path) -> None:
        """Makes a copy of its reference at work/run."""
        shutil.copytree(self.reference(setup), work / "run", copy_function=shutil.copy2)


def data_override(tasks: Path) -> str:
    """Returns the override that names the two tasks in a folder."""
    return f"data.paths=[{tasks}/adding,{tasks}/naming]"


def write_tasks(folder: Path, rows: int = 60) -> None:
    """Writes the two tasks, a function of the number of rows."""
    for name, longest in (("adding", 20), ("naming", 3)):
        draw = random.Random(name)
        lines = []
        for number in range(rows):
            answer = " ".join(str(draw.randint(0, 99)) for _ in range(draw.randint(1, longest)))
            turns = [
                {"role": "human", "content": f"{name} {number}: what comes next?"},
                {"role": "bot", "content": f"it is {answer}"},
            ]
            lines.append(json.dumps({"chat_rounds": turns}))
        (folder / name).mkdir(parents=True)
        (folder / name / "rows.jsonl").write_text("\n".join(lines) + "\n")
        os.utime(folder / name / "rows.jsonl", (1.7e9, 1.7e9))
