"""The real loop and engine with a tiny model: the same global batch in any layout, every mode one after
another.

A step's samples are given, not the sampler's, so that padded and packed rows hold the same ones; everything
after that is what `mft train` runs: rows, deal, collate, model, loss mode, engine, probes, metrics.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mft.batch import BatchSizes
from mft.config.build import build
from mft.data.cache.store import prepare
from mft.data.loader import BatchLoader
from mft.data.packing import Pack, Pad
from mft.data.settings import DataSettings
from mft.data.task import Task
from mft.data.template_choice import adopt, named
from mft.data.tokenize import Encoder
from mft.hardware import quiet_libraries
from mft.loss.base import TaskLoss
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss
from mft.tracking.base import Tracker
from mft.training.checkpoint import Checkpoints, ModelExport
from mft.training.loop import fit
from mft.training.metrics import Meter
from mft.training.progress import Terminal
from mft.training.settings import TrainSettings
from mft.training.state import State
from mft.training.trainer import Trainer
from mft.training.validate import Evaluator
from tests.loss.modes import config, made

TASKS = {"a": 40, "b": 24, "c": 12}
"""Rows of each task."""
STEPS, SAMPLES, SEQ_LENGTH = 4, 12, 96
LR = 1e-2


def write_tasks(root: Path) -> None:
    """Writes tasks of very different size and length of answers."""
    for number, (name, rows) in enumerate(TASKS.items()):
        draw = random.Random(name)
        folder = root / name
        folder.mkdir(parents=True)
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for row in range(rows):
                answer = " ".join(f"{draw.randint(0, 9)}" for _ in range(draw.randint(1, 3 + 9 * number)))
                turns = [{"role": "human", "content": f"{name}{row}"}, {"role": "bot", "content": answer}]
                file.write(json.dumps({"chat_rounds": turns}) + "\n")


class Chosen:
    """Stands for the sampler: `SAMPLES` samples a step, task c absent from every third step."""

    def __init__(self, feed: BatchLoader):
        self.feed = feed

    def rows_in_epoch(self, epoch: int) -> int:
        return 10**6

    def steps(self, epoch: int = 0, position: int = 0) -> Iterator[tuple[list[list[int]], tuple[int, int]]]:
        samples, hands = self.feed.train_samples, self.feed.sizes.world * self.feed.sizes.accumulation
        while True:
            draw = np.random.default_rng([7, position])
            tasks = range(2 if position % 3 == 2 else len(TASKS))
            one_each = [draw.choice(np.flatnonzero(samples.task_N == task)) for task in tasks]
            others = np.setdiff1d(np.flatnonzero(samples.task_N < len(tasks)), one_each)
            part = np.array([*one_each, *draw.choice(others, SAMPLES - len(tasks), replace=False)])
            rows = [part[row].tolist() for row in self.feed.rows.rows(samples.lengths_N[part], SEQ_LENGTH)]
            rows += [[] for _ in range(-len(rows) % hands)]
            position += 1
            yield rows, (0, position)


class Recorder(Tracker):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, values: dict[str, float]) -> None:
        self.rows.setdefault(step, {}).update(values)

    def losses(self) -> list[float]:
        """Returns the objective of every step."""
        return [row["train/loss"] for _, row in sorted(self.rows.items())]

    def weights(self) -> list[dict[str, float]]:
        """Returns the task weights of every step; empty for modes whose weights do not move."""
        rows = [row for _, row in sorted(self.rows.items())]
        return [{name: row[name] for name in row if name.startswith("train/weight/")} for row in rows]


@dataclass
class Layout:
    """Micro-batches of a rank in one step, and whether rows are packed; the number of ranks is that of the
    group."""

    accumulation: int
    packed: bool
    backend: str = "ddp"


@dataclass
class Played:
    """What a mode did: objective and weights by step, all trained parameters before and after."""

    losses: list[float]
    weights: list[dict[str, float]]
    before: torch.Tensor
    after: torch.Tensor

    @property
    def update(self) -> torch.Tensor:
        return self.after - self.before


class Stage:
    """What the modes share in one rank and layout: engine, data, the model's first weights."""

    def __init__(self, root: Path, layout: Layout):
        self.root = root
        self.settings = TrainSettings(
            per_device_eval_batch_size=2, log_every=1, eval_every=None, eval_at_start=False, save_every=None
        )
        family = Tiny(cache_dir=str(root / "cache"), layers=1, vocab_size=258)
        tokenizer = family.tokenizer()
        template = named("mft", None, tokenizer)
        adopt(tokenizer, template)
        data = DataSettings(seq_length=SEQ_LENGTH, split=[70, 30, 0])
        encoder = Encoder(tokenizer, template)
        tasks = [Task(name=name, paths=[str(root / "tasks" / name)]) for name in TASKS]
        stores = [prepare(task, encoder, data, str(root / "cache")) for task in tasks]
        node = config(layout.backend, "dist").copy()
        if layout.backend == "zero3":
            node.persistence_threshold = 0  # tiny weights are below it and would stay whole
        self.engine = build(node).start("fp32", cpu=True)
        sizes = BatchSizes(1, layout.accumulation, self.engine.world)
        rows = Pack() if layout.packed else Pad()
        self.feed = BatchLoader(
            stores, rows, sizes, self.engine.rank, tokenizer.pad_token_id, self.settings, data, [None] * 3
        )
        self.feed.sampler = Chosen(self.feed)
        self.family = family

    def training(
        self,
        loss: TaskLoss,
        recorder: Recorder,
        steps: int = STEPS,
        peft: Any = None,
        run_dir: Path | None = None,
        fused: bool = False,
    ) -> Trainer:
        """Returns a run with fresh weights. peft: None trains all of them; run_dir: where checkpoints go;
        fused: the optimizer is one kernel."""
        engine, names = self.engine, list(TASKS)
        with engine.loading():
            model = self.family.model(torch.float32)
        torch.manual_seed(0)
        module = TokenLoss(peft.attach(model, self.family) if peft else model, self.family)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Adam divides a gradient by its size; where that is near 0, eps keeps a rounding error from becoming
        # a step.
        module, optimizer = engine.prepare(module, torch.optim.AdamW(trained, lr=LR, eps=1e-4, fused=fused))
        loss.setup(names, [1.0] * len(names))
        loss.check_schedule(steps, self.feed.valid_counts(len(names)))
        return Trainer(
            engine=engine,
            module=module,
            optimizer=optimizer,
            loss=loss,
            names=names,
            weights=[1.0] * len(names),
            loader=self.feed,
            learning_rate=lambda step: LR,
            evaluator=Evaluator(engine, names, self.feed.validation),
            probe=lambda step: Evaluator(
                engine, names, lambda: self.feed.probe(step, loss.probe_samples)
            ).losses(module),
            save=Checkpoints(
                run_dir or self.root / "run", engine, loss, ModelExport(lambda folder: None, 0), keep=None
            ).save,
            meter=Meter(names, engine.device),
            tracker=recorder,
            progress=Terminal((), quiet=True),
            settings=copy.copy(self.settings),
            total_steps=steps,
            stop_requested=lambda: False,
            origin=str,
            state=State(),
        )

    def parameters(self, t: Trainer) -> torch.Tensor:
        """Returns all trained parameters as one vector (on rank 0; whatever the others have elsewhere)."""
        state = self.engine.full_state(trainable=True)
        return torch.cat(
            [value.detach().double().flatten().cpu() for _, value in sorted(state.items())]
            or [torch.zeros(0)]
        )

    def play(self, mode: str) -> Played:
        recorder = Recorder()
        t = self.training(made(mode), recorder)
        before = self.parameters(t)
        assert fit(t) == "finished"
        return Played(recorder.losses(), recorder.weights(), before, self.parameters(t))


def played(root: str, plan: Sequence[tuple[Layout, Sequence[str]]]) -> list[dict[str, Played]]:
    """Returns what every mode of every layout in the plan did; in a group of ranks all of them call it."""
    torch.set_num_threads(1)
    quiet_libraries()
    found = []
    for layout, modes in plan:
        stage = Stage(Path(root), layout)
        found.append({mode: stage.play(mode) for mode in modes})
        stage.engine.close()
    return found
