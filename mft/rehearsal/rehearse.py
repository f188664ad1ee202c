"""A rehearsal, top to bottom: the data, the model without weights, one step of its stand-in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mft.assembly.loader import make_loader, plan
from mft.assembly.model import load_model
from mft.assembly.start import Run, read_data
from mft.assembly.trainer import make_trainer
from mft.batch import BatchSizes
from mft.config import build, schema
from mft.console.tables import settings_table
from mft.data.loader import BatchLoader
from mft.distributed.ddp import Single
from mft.errors import UserError
from mft.estimate import checkpoints
from mft.estimate.memory import optimizer_bytes, size_words
from mft.hardware import quiet_libraries
from mft.model.introspect import base_of, parameter_count
from mft.model.peft import summary as trained_weights
from mft.plan.case import Case, case_on
from mft.plan.gpus import Device
from mft.plan.memory import needed, room
from mft.plan.report import memory_table
from mft.rehearsal.short_rows import TOKENS, short
from mft.rehearsal.stand_in import stand_in
from mft.tracking.base import Tracker
from mft.training.checkpoint import write_final
from mft.training.loop import fit
from mft.training.progress import Terminal
from mft.training.settings import KeptState, Precision

MICRO_BATCHES = 16
"""Of two rows each, at most, in the rehearsed step."""


class Measured(Tracker):
    """Keeps what the loop logs."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.values |= values


class Rehearsal:
    """Rehearses a run in a temporary folder, of which nothing is kept but the token cache.

    folder: the temporary one; output_dir: of the run; world: its ranks on all machines; device: what its first
    rank computes on.
    """

    def __init__(self, folder: Path, output_dir: Path, world: int, device: Device):
        self.folder, self.output_dir, self.world, self.device = folder, output_dir, world, device
        self.doing = "at its start"
        """What is being done, for the sentence that reports a failure."""
        self._count: int | None = None

    def perform(self, cfg: DictConfig) -> None:
        """Rehearses the run of a frozen config, and prints as it goes. Raises what a run would raise."""
        quiet_libraries()
        r = self._data(schema.typed(cfg))
        self.doing = "while reading the data"
        loader = make_loader(r, self.world)
        facts = plan(r.parts, loader)
        r.progress.show(settings_table(facts.items(), "training"))
        self.doing = "while building the model without weights"
        self._weights(r, loader)
        self.doing = "in one step of a tiny model"
        self._step(r)
        r.engine.close()

    def _data(self, cfg: DictConfig) -> Run:
        parts = build.build_components(cfg)
        settings, data_settings = schema.settings_of(cfg)
        self.doing = "while tokenising"
        data = read_data(cfg, parts, data_settings)
        cpu = Precision.fp32 if settings.precision is Precision.fp16 else settings.precision
        engine, progress = Single().start(cpu.value, cpu=True), Terminal(data.names)
        if cpu is not settings.precision:
            progress.show("fp16 needs a GPU: the step is rehearsed in fp32")
        return Run(cfg, self.folder, parts, settings, data_settings, data, engine, progress, True)

    def _weights(self, r: Run, loader: BatchLoader) -> None:
        """Shows what is trained, and what a rank needs of memory and a checkpoint of disk."""
        of = case_on(r.cfg, r.parts, self.device, self.world)
        try:
            counted = of.skeleton
        except UserError as error:
            r.progress.show(f"memory: not known before loading: {error}")
            return
        r.progress.show(trained_weights.table(of.parts.peft.audit(counted.model)))
        self._count = parameter_count(base_of(counted.model))
        self._memory(r, of)
        states = optimizer_bytes(r.parts.optimizer, r.parts.base_lr)
        settings, total = r.settings, loader.total_steps()
        gathers = getattr(r.parts.dist, "gather_on_save", True)
        newest = checkpoints.size(counted.sizes, states, gathers)
        kept_states = 0.0 if settings.save_state is KeptState.last else states
        older = checkpoints.size(counted.sizes, kept_states, gathers)
        keep = settings.keep if settings.keep is not None else r.parts.peft.default_checkpoint_limit
        written = -(-total // settings.save_every) if settings.save_every else 1
        told = checkpoints.words(newest, older, keep, written, self.output_dir)
        r.progress.show(settings_table([("checkpoints", told)], "needs"))

    def _memory(self, r: Run, of: Case) -> None:
        """Shows what a rank needs of memory, as `mft plan` does."""
        try:
            need = needed(of)
        except Exception as error:  # a class of model may object to having no weights, which a run gives it
            r.progress.show(f"memory: not known before loading: {' '.join(str(error).split())}")
            return
        usable = f"{size_words(need.peak)} of the {size_words(room(of))} that are counted on"
        r.progress.show(memory_table(need, f"{of.device.name}, {usable}"))
        for note in need.notes:
            r.progress.show(note)

    def _step(self, r: Run) -> None:
        """Trains a stand-in for one step, validates and saves it, as a run does it."""
        peft: Any = r.parts.peft
        try:
            family, words = stand_in(
                r.parts.model, self.folder / "model", getattr(peft, "rank", 0), self._count
            )
        except UserError as error:
            r.progress.show(f"one step: not rehearsed, since the model cannot be made small: {error}")
            return
        if getattr(peft, "path", None):
            r.progress.show("peft.path: a new adapter stands in for it, since it fits the real model alone")
            peft = dataclasses.replace(peft, path=None)
        names, data, settings = r.data.names, r.data_settings, r.settings
        small = dataclasses.replace(
            r,
            parts=dataclasses.replace(r.parts, model=family, peft=peft, trackers=[]),
            settings=dataclasses.replace(
                settings,
                max_steps=1,
                epochs=1.0,
                log_every=1,
                eval_every=1,
                save_every=1,
                precision=Precision.fp32 if settings.precision is Precision.fp16 else settings.precision,
                early_stopping=False,
            ),
            data=dataclasses.replace(r.data, stores=short(r.data.stores)),
            data_settings=dataclasses.replace(data, seq_length=min(data.seq_length, 2 * TOKENS), limit=None),
            progress=Terminal(names, quiet=True),
        )
        sizes = BatchSizes(2, min(len(names), MICRO_BATCHES), 1)
        shares = [task.share for task in r.data.tasks]
        pad_id: Any = r.data.tokenizer.pad_token_id
        loader = BatchLoader(
            small.data.stores, r.parts.rows, sizes, 0, pad_id, small.settings, small.data_settings, shares
        )
        model = load_model(small)
        trainer, _, export = make_trainer(small, loader, model, lambda: False)
        measured = trainer.tracker = Measured()
        fit(trainer)
        write_final(self.folder, r.engine, export)
        shown = {"train/loss": "loss", "grad_norm": "gradient norm", "valid/loss": "validation loss"}
        found = [
            f"{word} {measured.values[key]:.3f}" for key, word in shown.items() if key in measured.values
        ]
        r.progress.show(f"one step: {', '.join(found)}; validated, saved, on the CPU, of a random {words}")
