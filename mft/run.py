"""One run, top to bottom: data, engine, model, trainer, final model, summary. Every rank executes it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from mft.batch import BatchSizes
from mft.config import inputs
from mft.config.build import Components, build_components
from mft.config.identity import CONTENTS, identity_of
from mft.config.schema import batch_sizes, plain, typed
from mft.config.validate import check_validation
from mft.console.tables import settings_table
from mft.data import mixture, report
from mft.data.datasets import Dataset, dataset
from mft.data.loader import BatchLoader
from mft.data.prompts import read_prompts
from mft.data.settings import DataSettings
from mft.distributed.engine import Engine
from mft.distributed.rng import seed_everything
from mft.files.checksums import require_sound
from mft.files.json_file import read_json, write_json
from mft.hardware import quiet_libraries
from mft.run_folder import RunStatus
from mft.tracking.base import FanOut, Jsonl, Tracker
from mft.training import summary
from mft.training.checkpoint import Checkpoints, restore, write_final
from mft.training.loop import fit
from mft.training.metrics import Meter, flops_per_token
from mft.training.progress import Terminal
from mft.training.provenance import fingerprint_tag, tags
from mft.training.resume import all_damaged, newest_sound, set_aside
from mft.training.sample_answers import Answers
from mft.training.settings import TrainSettings
from mft.training.trainer import Trainer
from mft.training.validate import Evaluator

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass
class Run:
    """What the steps of a run hand on to one another."""

    cfg: DictConfig
    folder: Path
    parts: Components
    train: TrainSettings
    data_settings: DataSettings

    @property
    def first_here(self) -> bool:
        """Whether this is the first rank of its machine: known before any process group is up."""
        return os.environ.get("LOCAL_RANK", "0") == "0"


def run(cfg: DictConfig, run_dir: Path, stop: Callable[[], bool]) -> RunStatus:
    """Runs, or resumes, the run of a frozen config; returns finished or stopped.

    stop: whether this rank was asked to end after the current step.
    """
    started = time.perf_counter()
    quiet_libraries()
    cfg = typed(cfg)
    train, data_settings = OmegaConf.to_object(cfg.train), OmegaConf.to_object(cfg.data)
    assert isinstance(train, TrainSettings) and isinstance(data_settings, DataSettings)
    r = Run(cfg, run_dir, build_components(cfg), train, data_settings)

    data = load_data(r)
    engine = r.parts.dist.start(train.precision.value)
    progress = Terminal(data.names, quiet=not engine.is_main)
    loader = make_loader(r, data, engine, progress)
    model = load_model(r, engine)
    trainer, export = make_trainer(r, data, loader, model, engine, progress, stop)
    answers = make_answers(r, data, model, engine)
    answers.ask("before")
    resume(r, trainer)
    result = train_and_record(r, trainer, export, answers, started)
    if answers.prompts:
        progress.show(answers.table())
    summary.show(result, trainer, run_dir)
    engine.close()
    return RunStatus(result["status"])


def load_data(r: Run) -> Dataset:
    """Reads, or tokenises, the data; raises UserError where it is not what the run's identity records."""
    data = dataset(
        r.parts.named_tasks,
        r.data_settings,
        r.parts.model.tokenizer(),
        r.cfg.cache_dir,
        r.parts.rows.splits_samples,
        first=r.first_here,  # one rank of each machine tokenises
    )
    require_unchanged(r, data.fingerprints)
    return data


def make_loader(r: Run, data: Dataset, engine: Engine, progress: Terminal) -> BatchLoader:
    """Returns what deals the micro-batches to this rank; shows and writes what the run will take of each
    task."""
    if engine.is_main:
        data.write_report(r.folder / "report")
    for renderable in (*report.tables(data.stores, data.names), *report.notes(data.stores, data.names)):
        progress.show(renderable)
    sizes, shares = batch_sizes(r.train, engine.world), [task.share for task in data.tasks]
    pad_id: Any = data.tokenizer.pad_token_id
    loader = BatchLoader(
        data.stores, r.parts.rows, sizes, engine.rank, pad_id, r.train, r.data_settings, shares
    )
    total, mixed = loader.total_steps(), loader.mixture(data.names)
    progress.show(mixture.table(mixed, r.data_settings))
    if (warmup := getattr(r.parts.scheduler, "warmup", 0)) >= 1 and warmup > total:
        progress.show(
            f"scheduler.warmup={warmup:g}: the learning rate does not reach its peak in {total:,} steps"
        )
    if engine.is_main:
        write_json(r.folder / "report" / "mixture.json", mixed)
        write_json(r.folder / "plan.json", {"total_steps": total, "tasks": data.names})
    valid_counts = loader.valid_counts(len(data.tasks))
    check_validation(r.train, r.parts.loss, dict(zip(data.names, valid_counts, strict=True)))
    r.parts.loss.setup(data.names, [task.weight for task in data.tasks])
    r.parts.loss.check_schedule(total, valid_counts)
    return loader


def load_model(r: Run, engine: Engine) -> PreTrainedModel | PeftModel:
    """Returns the model with what the peft mode adds to it, on every rank the same."""
    from mft.model.peft.full import compute_dtype

    family, peft, precision = r.parts.model, r.parts.peft, r.train.precision.value
    seed_everything(r.train.seed)  # the same first adapters on every rank
    computing = compute_dtype(precision)
    if r.first_here and Path(family.source()).is_dir():  # a model that mft wrote; of others nothing is known
        require_sound(Path(family.source()))
    model: Any
    with engine.loading():
        model = family.model(peft.dtype(precision), peft.quantization(computing), compute_dtype=computing)
    model = peft.attach(model, family)
    require_unchanged(r, {})
    return model  # type: ignore[no-any-return]


def make_trainer(
    r: Run,
    data: Dataset,
    loader: BatchLoader,
    model: Any,
    engine: Engine,
    progress: Terminal,
    stop: Callable[[], bool],
) -> tuple[Trainer, Callable[[Path], None]]:
    """Returns what the loop works on, and a function that writes the model to a folder (all ranks call
    it)."""
    from mft.model.export import save_final
    from mft.model.introspect import base_of
    from mft.model.token_loss import TokenLoss

    family, peft, loss, train = r.parts.model, r.parts.peft, r.parts.loss, r.train
    checkpointing = family.checkpoint(model)
    token_loss = TokenLoss(model, family)
    module, optimizer = engine.prepare(
        token_loss, r.parts.optimizer.build(token_loss.named_parameters(), r.parts.base_lr)
    )

    def export(folder: Path) -> None:
        # of an adapter's run the base is not gathered: it is not saved
        weights = engine.full_state(trainable=base_of(model) is not model)
        if engine.is_main:
            save_final(token_loss, data.tokenizer, folder, state_dict=weights)

    def probe(step: int) -> torch.Tensor:
        return Evaluator(engine, data.names, lambda: loader.probe(step, loss.probe_samples)).losses(module)

    total, base_lr, scheduler = loader.total_steps(), r.parts.base_lr, r.parts.scheduler
    keep = train.keep if train.keep is not None else peft.default_checkpoint_limit
    write_model = export if engine.gather_on_save else ignore
    trainer = Trainer(
        engine=engine,
        module=module,
        optimizer=optimizer,
        loss=loss,
        names=data.names,
        weights=[task.weight for task in data.tasks],
        loader=loader,
        learning_rate=lambda step: scheduler.lr(step, total, base_lr),
        evaluator=Evaluator(engine, data.names, loader.validation),
        probe=probe,
        save=Checkpoints(r.folder, engine, loss, write_model, keep, train.keep_task_best).save,
        meter=Meter(data.names, engine.device, flops_per_token(token_loss), train.peak_tflops),
        tracker=FanOut([Jsonl(), *r.parts.trackers]) if engine.is_main else Tracker(),
        progress=progress,
        settings=train,
        total_steps=total,
        stop_requested=stop,
        origin=lambda sample: data.stores[sample[0]].origin(sample[1]),
    )
    show_model(r, trainer, model, loader.sizes, checkpointing)
    return trainer, export


def show_model(r: Run, t: Trainer, model: Any, sizes: BatchSizes, checkpointing: bool) -> None:
    """Shows which weights are trained, and how."""
    from mft.model.attention import described
    from mft.model.introspect import base_of
    from mft.model.peft import summary as trained_weights

    trained = r.parts.peft.audit(model)
    if t.engine.is_main:
        write_json(r.folder / "report" / "trained.json", trained_weights.as_json(trained))
    t.progress.show(trained_weights.table(trained))
    facts = {
        "steps": f"{t.total_steps:,}",
        "a step": f"{sizes.total} rows = {sizes.per_device} x {sizes.accumulation} micro-batches x {sizes.world} ranks",
        "loss": type(t.loss).__name__,
        "learning rate": f"{r.parts.base_lr:g}, {type(r.parts.scheduler).__name__}",
        "precision": f"{r.train.precision.value} on {t.engine.device}, attention {described(base_of(model))}",
        "gradient checkpointing": "on" if checkpointing else "off",
    }
    t.progress.show(settings_table(list(facts.items()), "training"))


def make_answers(r: Run, data: Dataset, model: Any, engine: Engine) -> Answers:
    """Returns what asks the model the prompts of train.prompts; a sharded model answers with all ranks
    together."""
    from mft.model import generate

    def answer(conversations: list[list[dict[str, str]]]) -> list[str]:
        model.eval()
        options: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": r.train.prompts_max_new_tokens,
            "together": engine.sharded,
        }
        texts = engine.run_as_forward(lambda: generate.answer(model, data.encoder, conversations, **options))
        model.train()
        return texts

    prompts = read_prompts(Path(r.train.prompts)) if r.train.prompts else []
    return Answers(prompts if engine.is_main or engine.sharded else [], answer)


def resume(r: Run, t: Trainer) -> None:
    """Takes up the newest checkpoint that is as it was written; the damaged ones newer than it are set
    aside."""
    checkpoint, damaged = newest_sound(r.folder, t.engine)
    if checkpoint is None and damaged:
        raise all_damaged(r.folder, damaged)
    for name, problem in damaged.items() if t.engine.is_main else ():
        moved = set_aside(r.folder / "checkpoints" / name, "damaged")
        t.progress.show(f"{name} is damaged and passed over: {problem}; it is now checkpoints/{moved.name}")
    if checkpoint is None:
        seed_everything(r.train.seed + 1 + t.engine.rank)  # dropout differs from rank to rank
        return
    exact = restore(checkpoint, t.state, t.engine, t.loss)
    other = (
        "" if exact else ", written on another number of ranks: the same samples, losses equal to rounding"
    )
    t.progress.show(f"resuming from {checkpoint.name}{other}")


def train_and_record(
    r: Run, t: Trainer, export: Callable[[Path], None], answers: Answers, started: float
) -> dict[str, Any]:
    """Trains, writes the final model, and leaves the summary and the record of the trackers; returns the
    summary."""
    engine, folder = t.engine, r.folder
    status = RunStatus.failed
    t.tracker.open(folder, plain(r.cfg), run_tags(r.cfg, folder), t.state.step)
    try:
        t.progress.start(t.state.step, t.total_steps)
        status = fit(t)
        t.progress.close()
        if status is RunStatus.finished:
            write_final(folder, engine, export)
            answers.ask("after")
        result = summary.summarise(t, status, folder, time.perf_counter() - started)
        if engine.is_main:
            summary.write(result, folder)
        engine.barrier()  # the other ranks leave with the code that the summary's status stands for
        if engine.is_main:
            answers.write(folder / "report" / "answers.md")
            for path in ("config.yaml", "summary.json", "report"):
                t.tracker.artifact(folder / path)
            for checkpoint in sorted(folder.glob("checkpoints/step-*")):
                t.tracker.checkpoint(checkpoint)
            t.tracker.model(folder / "final")
    except Exception as error:
        if engine.is_main:
            with suppress(OSError):  # the disk that ended the run may be full
                summary.failed(folder, error, t.state.step)
        raise
    finally:
        t.progress.close()
        t.tracker.close(status)
    return result


def require_unchanged(r: Run, read: Mapping[str, str]) -> None:
    """Raises UserError where what was read is not what the folder's identity records.

    read: fingerprints of what was read; the other files are looked at here. It is called after each reading,
    since files may change between the check of a run, or of a sweep, and its start.
    """
    if (recorded := identity_of(r.folder)) is not None:
        recorded.require({**read, **inputs.files(r.cfg, r.parts.model, r.parts.peft)}, plain(r.cfg))


def ignore(folder: Path) -> None:
    """Exports nothing: the checkpoints of this engine hold the sharded state alone."""


def run_tags(cfg: DictConfig, run_dir: Path) -> dict[str, str]:
    """Returns what a tracker keeps beside the config: what ran, in which sweep, on which data, versions,
    host."""
    record, identity = read_json(run_dir / "overrides.json"), identity_of(run_dir)
    kept = tags() | {
        "overrides": " ".join(record.texts("overrides")),
        "identity": identity.extended if identity else "",
        "data_fingerprint": record.text("data"),
        "run_folder": str(run_dir),
    }
    if identity:
        contents = {name: value for name, value in identity.fingerprints.items() if name in CONTENTS}
        kept |= {fingerprint_tag(name): value for name, value in contents.items()}
        kept |= {"tasks": json.dumps(identity.tasks)}
    kept |= {
        group: option for group, option in cfg.choices.items() if group in ("model", "peft", "dist", "loss")
    }
    if record.text("sweep"):
        kept |= {"sweep": record.text("sweep"), "job": record.text("label") or kept["overrides"]}
    return kept
