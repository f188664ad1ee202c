"""The project's own engine, model and loop around a model, and a step of them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.timing import Clock, Marked, number_of_steps, or_memory, summary
from mft.distributed.ddp import Single
from mft.distributed.engine import Backend
from mft.distributed.rng import seed_everything
from mft.hardware import quiet_libraries
from mft.loss.means import TaskTokenMean
from mft.model.attention import FAST, SDPA
from mft.model.causal_lm import CausalLM
from mft.model.introspect import base_of
from mft.model.peft.full import Full, compute_dtype
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.token_loss import TokenLoss
from mft.optim.optimizers import AdamW
from mft.tracking.base import Tracker
from mft.training.loop import train_on
from mft.training.memory import PeakMemory
from mft.training.metrics import Meter
from mft.training.prefetch import Prefetched
from mft.training.progress import Terminal
from mft.training.settings import TrainSettings
from mft.training.trainer import Trainer
from mft.training.validate import Evaluator
from tests.gpu.children import Place

LORA = {"rank": 16, "targets": "all-linear"}
PEFTS: dict[str, Full] = {"full": Full(), "lora": Lora(**LORA), "qlora": QLora(**LORA)}
PRECISION = "bf16"


class Stage:
    """A model that an engine has prepared; `time` trains steps of it."""

    def __init__(
        self, name: str, peft: str, place: Place, backend: Backend | None = None, rows: int | None = None
    ):
        """name: of the model; rows: positions whose logits exist at once, None = as trained."""
        quiet_libraries()
        seed_everything(0)
        backend, self.peft, self.place = backend or Single(), PEFTS[peft], place
        self.family = CausalLM(str(models.folder(name, place)), gradient_checkpointing=True)
        self.vocabulary = models.shape(name, place).vocabulary
        self.engine = backend.start(PRECISION)
        computing = compute_dtype(PRECISION)
        packed = self.peft.quantization(computing, backend.casts_weights_to(PRECISION))
        with self.engine.loading(quantised=packed is not None) as device:
            base = self.family.model(
                self.peft.dtype(PRECISION), packed, compute_dtype=computing, device=device
            )
        self.model: Any = self.peft.attach(base, self.family)
        token_loss = TokenLoss(self.model, self.family, rows)
        optimizer = AdamW(lr=1e-5).build(token_loss.named_parameters(), 1e-5)
        self.module, self.optimizer = self.engine.prepare(token_loss, optimizer)

    def trainer(self, source: Any, total: int) -> Trainer:
        """Returns a run over the source that neither validates nor saves nor logs."""
        loss, engine = TaskTokenMean(), self.engine
        loss.setup(["random"], [1.0])
        return Trainer(
            engine=engine,
            module=self.module,
            optimizer=self.optimizer,
            loss=loss,
            names=["random"],
            weights=[1.0],
            loader=source,
            learning_rate=lambda step: 1e-5,
            evaluator=Evaluator(engine, ["random"], list),
            probe=lambda step: torch.zeros(1),
            save=lambda state: Path(),
            meter=Meter(["random"], engine.device),
            tracker=Tracker(),
            progress=Terminal((), quiet=True),
            settings=TrainSettings(log_every=10**9, eval_every=None, save_every=None),
            total_steps=total,
            stop_requested=lambda: False,
            origin=str,
        )

    def train(self, kind: str, steps: int) -> Marked:
        """Trains steps of rows P, O or M; returns their marks."""
        rows = models.Rows(kind, models.length(self.place), self.vocabulary)
        clock, memory = Clock(self.engine.device), PeakMemory.of(self.engine.device)
        source = Prefetched(rows, self.engine.device)
        marked = Marked(source, clock, memory, number_of_steps(self.place)[0])
        self.module.train()
        # the run is one step longer than what it is given, so that it does not end by validating and saving
        train_on(self.trainer(marked, steps + 1), marked.steps(count=steps))
        return marked

    def time(self, kind: str, checkpointing: bool = False, fast: bool = True) -> dict[str, Any]:
        """Returns times and peak of a step. fast: by the fastest kernel of attention, else by sdpa."""
        base = base_of(self.model)
        if checkpointing:
            self.family.checkpoint(self.model)
        else:
            base.gradient_checkpointing_disable()
        base.set_attn_implementation(FAST if fast else SDPA)

        def steps() -> dict[str, float]:
            marked = self.train(kind, number_of_steps(self.place)[1])
            return summary(marked.clock, marked.warm_up, marked.memory, marked.tokens)

        return or_memory(steps)

    def close(self) -> None:
        """Frees the device."""
        self.engine.close()
        del self.module, self.model, self.optimizer, self.engine
        gc.collect()
        if self.place.device == "cuda":
            torch.cuda.empty_cache()
