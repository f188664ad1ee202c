"""A rehearsal, top to bottom: the data, the model without weights, one step of its stand-in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mft.assembly.loader import make_loader, plan
from mft.assembly.model import load_model
from mft.assembly.start import Run, read_data, settings_of
from mft.assembly.trainer import make_trainer
from mft.batch import BatchSizes
from mft.config import build, schema
from mft.console.tables import settings_table
from mft.data.loader import BatchLoader
from mft.distributed.ddp import Single
from mft.errors import UserError
from mft.estimate import checkpoints, memory
from mft.hardware import quiet_libraries
from mft.model.introspect import base_of, parameter_count
from mft.model.meta_model import skeleton
from mft.model.peft import summary as trained_weights
from mft.model.peft.full import compute_dtype
from mft.model.special_tokens import add_new_tokens, widen_embeddings
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

    folder: the temporary one; output_dir: of the run; world: its ranks on all machines.
    """

    def __init__(self, folder: Path, output_dir: Path, world: int):
        self.folder, self.output_dir, self.world = folder, output_dir, world
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
        settings, data_settings = settings_of(cfg)
        self.doing = "while tokenising"
        data = read_data(cfg, parts, data_settings)
        cpu = Precision.fp32 if settings.precision is Precision.fp16 else settings.precision
        engine, progress = Single().start(cpu.value, cpu=True), Terminal(data.names)
        if cpu is not settings.precision:
            progress.show("fp16 needs a GPU: the step is rehearsed in fp32")
        return Run(cfg, self.folder, parts, settings, data_settings, data, engine, progress, True)

    def _weights(self, r: Run, loader: BatchLoader) -> None:
        """Shows what is trained, and what a rank needs of memory and a checkpoint of disk."""
        family, peft, precision = r.parts.model, r.parts.peft, r.settings.precision.value
        if family.trust_remote_code:
            r.progress.show("memory: not known before loading, since code of the checkpoint builds the model")
            return
        quantization = peft.quantization(compute_dtype(precision))
        base = skeleton(family.config(), quantization, peft.dtype(precision))
        if family.new_tokens():
            added = add_new_tokens(family.read_tokenizer(), family.add_tokens, family.add_special_tokens)
            widen_embeddings(base, added, family.pad_to_multiple_of)
        if adapter := getattr(peft, "path", None):
            r.progress.show(f"memory: decided by the adapter at peft.path={adapter}")
            return
        # an initialisation that computes with the weights trains as many as any other
        plain = {"init": True} if getattr(peft, "changes_base", False) else {}
        model: Any = dataclasses.replace(peft, **plain).attach(base, family)
        rows = peft.audit(model)
        r.progress.show(trained_weights.table(rows))
        self._count = parameter_count(base_of(model))
        sizes = memory.Sizes.of(model, rows)
        states = memory.optimizer_bytes(r.parts.optimizer, r.parts.base_lr)
        held = memory.by_part(sizes, r.parts.dist, self.world, precision != "fp32", states)
        offloads = any(getattr(r.parts.dist, name, False) for name in vars(r.parts.dist) if "offload" in name)
        settings, total = r.settings, loader.total_steps()
        gathers = getattr(r.parts.dist, "gather_on_save", True)
        newest = checkpoints.size(sizes, states, gathers)
        kept_states = 0.0 if settings.save_state is KeptState.last else states
        older = checkpoints.size(sizes, kept_states, gathers)
        keep = settings.keep if settings.keep is not None else peft.default_checkpoint_limit
        written = -(-total // settings.save_every) if settings.save_every else 1
        facts = {
            "memory": memory.words(held, self.world, offloads),
            "checkpoints": checkpoints.words(newest, older, keep, written, self.output_dir),
        }
        r.progress.show(settings_table(facts.items(), "needs"))

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
