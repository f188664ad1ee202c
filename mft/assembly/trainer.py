"""The trainer of a run: everything that the loop works on, connected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mft.assembly import micro_batch
from mft.assembly.model import checkpoint_layers, show_model
from mft.assembly.start import Run
from mft.data.loader import BatchLoader
from mft.tracking.base import FanOut, Jsonl, Tracker
from mft.training import metrics, sample_losses
from mft.training.checkpoint import Checkpoints, ModelExport
from mft.training.prefetch import Prefetched
from mft.training.profile import StepProfile
from mft.training.settings import KeptLosses
from mft.training.trainer import Trainer
from mft.training.validate import Evaluator

if TYPE_CHECKING:
    import torch

    from mft.assembly.model import Model


def make_trainer(
    r: Run, loader: BatchLoader, model: Model, stop: Callable[[], bool]
) -> tuple[Trainer, Checkpoints, ModelExport]:
    """Returns what the loop works on, its checkpoints, and what writes the model to a folder."""
    from mft.model.export import save_final
    from mft.model.flops import token_flops
    from mft.model.introspect import base_of
    from mft.model.token_loss import TokenLoss

    engine, names, loss, settings = r.engine, r.data.names, r.parts.loss, r.settings
    token_loss = TokenLoss(model, r.parts.model)
    recomputed, words = checkpoint_layers(r, model)
    # before an engine divides the weights
    flops = token_flops(token_loss.model, token_loss.layer_classes(), recomputed)
    optimizer = r.parts.optimizer.build(token_loss.named_parameters(), r.parts.base_lr)
    coming = 0.0 if loader.sizes.found else micro_batch.optimizer_to_come(r, model)
    module, optimizer = engine.prepare(token_loss, optimizer)
    if not loader.sizes.found:
        r.phases.enter(r.phases.phase)  # keeps the peak so far: the trials begin it anew
        micro_batch.find(r, loader, module, coming)

    adapted = base_of(model) is not model  # the base below an adapter is not saved: it need not be gathered

    def write(folder: Path) -> None:
        weights = engine.full_state(trainable=adapted)
        if engine.is_main:
            save_final(token_loss, r.data.tokenizer, folder, state_dict=weights)

    def probe(step: int) -> torch.Tensor:
        return Evaluator(engine, names, lambda: loader.probe(step, loss.probe_samples)).losses(module)

    total, base_lr, scheduler = loader.total_steps(), r.parts.base_lr, r.parts.scheduler
    keep = settings.keep if settings.keep is not None else r.parts.peft.default_checkpoint_limit
    export = ModelExport(write, engine.full_size(trainable=adapted))
    # without gathering a checkpoint holds the sharded state alone
    in_checkpoint = export if engine.gather_on_save else ModelExport(lambda folder: None, 0)
    checkpoints = Checkpoints(
        r.folder, engine, loss, in_checkpoint, keep, settings.keep_task_best, settings.save_state
    )
    kept, stores = settings.sample_losses, r.data.stores
    by_sample = sample_losses.SampleLosses(
        r.folder, engine, names, lambda task, index_N: stores[task].digest_N[index_N], kept
    )
    trainer = Trainer(
        engine=engine,
        module=module,
        optimizer=optimizer,
        loss=loss,
        names=names,
        weights=[task.weight for task in r.data.tasks],
        loader=Prefetched(loader, engine.device) if settings.prefetch else loader,
        learning_rate=lambda step: scheduler.lr(step, total, base_lr),
        evaluator=Evaluator(engine, names, loader.validation),
        probe=probe,
        save=checkpoints.save,
        meter=metrics.Meter(
            names, engine.device, flops.model, settings.peak_tflops, flops.recomputed, r.phases
        ),
        tracker=FanOut([Jsonl(), *r.parts.trackers]) if engine.is_main else Tracker(),
        progress=r.progress,
        settings=settings,
        total_steps=total,
        stop_requested=stop,
        origin=lambda sample: stores[sample[0]].origin(sample[1]),
        test=Evaluator(engine, names, loader.test) if len(loader.test_samples) else None,
        sample_losses=by_sample if kept is not KeptLosses.none else None,
        profile=StepProfile(
            r.folder if settings.profile else None,
            r.phases,
            engine.device,
            loader.sizes.accumulation,
            (settings.eval_every, settings.save_every),
            engine.is_main,
            engine.barrier,
        ),
    )
    show_model(r, loader, model, words)
    return trainer, checkpoints, export
