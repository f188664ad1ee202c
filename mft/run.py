"""One run, top to bottom: data, engine, loader, model, training. Every rank executes it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from mft.config import build, identity, inputs, repetition, schema, validate
from mft.console.tables import settings_table
from mft.data import datasets, mixture, report
from mft.data.loader import BatchLoader
from mft.data.prompts import read_prompts
from mft.data.settings import DataSettings
from mft.distributed.determinism import compute_deterministically
from mft.distributed.engine import Engine
from mft.distributed.rng import seed_everything
from mft.files.checksums import require_sound
from mft.files.json_file import read_json, write_json
from mft.hardware import quiet_libraries
from mft.run_folder import RunStatus
from mft.tracking.base import FanOut, Jsonl, Tracker
from mft.training import final_test, metrics, provenance, resume, sample_losses, summary
from mft.training.checkpoint import Checkpoints, ModelExport, marked_steps, restore, write_final
from mft.training.loop import fit
from mft.training.prefetch import Prefetched
from mft.training.progress import Terminal
from mft.training.sample_answers import Answers
from mft.training.settings import KeptLosses, TrainSettings
from mft.training.trace import Trace
from mft.training.trainer import Trainer
from mft.training.validate import Evaluator

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Run:
    """What all steps of a run work with."""

    cfg: DictConfig
    folder: Path
    parts: build.Components
    settings: TrainSettings
    data_settings: DataSettings
    data: datasets.Dataset
    engine: Engine
    progress: Terminal
    first_here: bool
    """Whether this is the first rank of its machine: it tokenises and checks for all."""


def run(cfg: DictConfig, run_dir: Path, stop: Callable[[], bool], trace: Trace | None = None) -> RunStatus:
    """Runs, or resumes, the run of a frozen config; returns finished or stopped.

    stop: whether this rank was asked to end after the current step; trace: what to record of the steps.
    """
    started = time.perf_counter()
    quiet_libraries()
    r = start(schema.typed(cfg), run_dir)
    with r.engine.patient():  # few ranks read the weights, rank 0 alone writes the reports
        loader = make_loader(r, r.engine.world)
        model = load_model(r)
        trainer, checkpoints, export = make_trainer(r, loader, model, stop)
    if trace:
        trainer.loader = trace.steps_of(trainer.loader, trainer.state, run_dir, r.engine.rank)
    status = train_and_record(r, trainer, checkpoints, export, make_answers(r, model), started)
    r.engine.close()
    return status


def start(cfg: DictConfig, folder: Path) -> Run:
    """Reads, or tokenises, the data, then starts the engine; UserError where the data has changed.

    In this order: the ranks that wait for the tokens would wait in a collective otherwise, and time out.
    """
    parts = build.build_components(cfg)
    parts.dist.meet()
    settings, data_settings = settings_of(cfg)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of this machine; no process group says it yet
    data = read_data(cfg, parts, data_settings, first)
    require_unchanged(cfg, folder, parts, data.fingerprints)
    compute_deterministically(settings.deterministic)
    engine = parts.dist.start(settings.precision.value)
    progress = Terminal(data.names, quiet=not engine.is_main)
    return Run(cfg, folder, parts, settings, data_settings, data, engine, progress, first)


def settings_of(cfg: DictConfig) -> tuple[TrainSettings, DataSettings]:
    """Returns `train` and `data` of a typed config as objects."""
    settings, data_settings = OmegaConf.to_object(cfg.train), OmegaConf.to_object(cfg.data)
    assert isinstance(settings, TrainSettings) and isinstance(data_settings, DataSettings)
    return settings, data_settings


def read_data(
    cfg: DictConfig, parts: build.Components, settings: DataSettings, first_here: bool = True
) -> datasets.Dataset:
    """Returns the tokenised data of a run. first_here: see `Run`."""
    tokenizer, splits = parts.model.tokenizer(), parts.rows.splits_samples
    return datasets.dataset(parts.named_tasks, settings, tokenizer, cfg.cache_dir, splits, first_here)


def make_loader(r: Run, world: int) -> BatchLoader:
    """Returns the loader of this rank's micro-batches, of `world` ranks; shows and writes what the run takes
    of each task."""
    data, tasks, names, loss = r.data, r.data.tasks, r.data.names, r.parts.loss
    if r.engine.is_main:  # first: it says why a task has too few samples for what follows
        data.write_report(r.folder / "report")
    for renderable in (*report.tables(data.stores, names), *report.notes(data.stores, names)):
        r.progress.show(renderable)
    pad_id: Any = data.tokenizer.pad_token_id
    sizes, shares = schema.batch_sizes(r.settings, world), [task.share for task in tasks]
    loader = BatchLoader(
        data.stores, r.parts.rows, sizes, r.engine.rank, pad_id, r.settings, r.data_settings, shares
    )
    total, mixed = loader.total_steps(), loader.mixture(names)
    r.progress.show(mixture.table(mixed, r.data_settings))
    if (warmup := getattr(r.parts.scheduler, "warmup", 0)) >= 1 and warmup > total:
        r.progress.show(f"scheduler.warmup={warmup:g}: lr does not reach its peak in {total:,} steps")
    if r.engine.is_main:
        write_json(r.folder / "report" / "mixture.json", mixed)
        write_json(r.folder / "plan.json", {"total_steps": total, "tasks": names})
    valid_counts = loader.valid_counts(len(tasks))
    validate.check_validation(r.settings, loss, dict(zip(names, valid_counts, strict=True)))
    loss.setup(names, [task.weight for task in tasks])
    loss.check_schedule(total, valid_counts)
    return loader


def load_model(r: Run) -> Model:
    """Returns the model with what the peft mode adds to it, the same on every rank."""
    from mft.model.peft.full import compute_dtype

    family, peft, precision = r.parts.model, r.parts.peft, r.settings.precision.value
    seed_everything(r.settings.seed)  # equal initial adapters on every rank
    computing = compute_dtype(precision)
    if r.first_here and Path(family.source()).is_dir():  # passes folders that mft did not write
        require_sound(Path(family.source()))
    quantization = peft.quantization(computing, computing if r.parts.dist.casts_weights else None)
    with r.engine.loading(quantised=quantization is not None) as device:
        base = family.model(peft.dtype(precision), quantization, compute_dtype=computing, device=device)
    model: Any = peft.attach(base, family)
    require_unchanged(r.cfg, r.folder, r.parts)
    return model  # type: ignore[no-any-return]


def make_trainer(
    r: Run, loader: BatchLoader, model: Model, stop: Callable[[], bool]
) -> tuple[Trainer, Checkpoints, ModelExport]:
    """Returns what the loop works on, its checkpoints, and what writes the model to a folder."""
    from mft.model.export import save_final
    from mft.model.flops import token_flops
    from mft.model.introspect import base_of
    from mft.model.token_loss import TokenLoss

    engine, names, loss, settings = r.engine, r.data.names, r.parts.loss, r.settings
    recomputed, words = checkpoint_layers(r, loader, model)
    token_loss = TokenLoss(model, r.parts.model)
    # before an engine divides the weights
    flops = token_flops(token_loss.model, token_loss.layer_classes(), recomputed)
    optimizer = r.parts.optimizer.build(token_loss.named_parameters(), r.parts.base_lr)
    module, optimizer = engine.prepare(token_loss, optimizer)

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
        meter=metrics.Meter(names, engine.device, flops.model, settings.peak_tflops, flops.recomputed),
        tracker=FanOut([Jsonl(), *r.parts.trackers]) if engine.is_main else Tracker(),
        progress=r.progress,
        settings=settings,
        total_steps=total,
        stop_requested=stop,
        origin=lambda sample: stores[sample[0]].origin(sample[1]),
        test=Evaluator(engine, names, loader.test) if len(loader.test_samples) else None,
        sample_losses=by_sample if kept is not KeptLosses.none else None,
    )
    show_model(r, loader, model, words)
    return trainer, checkpoints, export


def checkpoint_layers(r: Run, loader: BatchLoader, model: Model) -> tuple[int, str]:
    """Turns gradient checkpointing on as model.gradient_checkpointing says; returns of how many layers one is
    recomputed, 0 = none, and that in words, with the reason where it is auto.

    On a GPU auto chooses by memory. All ranks do what the one chooses that has to recompute most: they
    exchange weights layer by layer where these are divided.
    """
    from mft.estimate import memory
    from mft.model import checkpointing

    family, longest = r.parts.model, r.data_settings.seq_length
    chosen, reason = 0, ""

    def by_memory() -> int:
        nonlocal chosen, reason
        import torch

        half, dist, world = r.settings.precision.value != "fp32", r.parts.dist, r.engine.world
        tokens = loader.sizes.per_device * longest
        layers = checkpointing.Layers.of(model, family.layer_classes(model), half, longest)
        sizes = memory.Sizes.of(model, r.parts.peft.audit(model))
        states = memory.optimizer_bytes(r.parts.optimizer, r.parts.base_lr)
        held = memory.by_part(sizes, dist, world, half, states)
        divided, copied = "weights" in dist.divided_parts(), sizes.trained if half else 0
        beside = memory.beside_activations(model, held, layers, tokens, divided, copied)
        total = torch.cuda.get_device_properties(r.engine.device).total_memory
        of_ranks = r.engine.gather(memory.recomputed(layers, tokens, beside, total))
        chosen, reason = min(of_ranks, key=lambda found: found[0] or math.inf)
        return chosen

    every = family.checkpoint(model, by_memory if r.engine.device.type == "cuda" else None)
    if reason and every != chosen:
        reason += f" with {checkpointing.described(chosen)}, which this class of model cannot do"
    return every, checkpointing.described(every) + reason


def show_model(r: Run, loader: BatchLoader, model: Model, checkpointing: str) -> None:
    """Shows which weights are trained, and how. checkpointing: in words."""
    from mft.model.attention import described
    from mft.model.introspect import base_of
    from mft.model.peft import summary as trained_weights
    from mft.model.peft.full import compute_dtype

    trained = r.parts.peft.audit(model)
    if r.engine.is_main:
        write_json(r.folder / "report" / "trained.json", trained_weights.as_json(trained))
    r.progress.show(trained_weights.table(trained))
    precision = f"{r.settings.precision.value} on {r.engine.device}"
    attention = described(base_of(model), r.engine.device, compute_dtype(r.settings.precision.value))
    facts = plan(r.parts, loader) | {
        "precision": f"{precision}, attention {attention}",
        "gradient checkpointing": checkpointing,
    }
    if adapters := r.parts.peft.computation(model):
        facts["adapters"] = adapters
    r.progress.show(settings_table(facts.items(), "training"))


def plan(parts: build.Components, loader: BatchLoader) -> dict[str, str]:
    """Returns how long the run is and what a step of it is made of, in words."""
    sizes = loader.sizes
    micro_batches = f"{sizes.per_device} x {sizes.accumulation} micro-batches x {sizes.world} ranks"
    return {
        "steps": f"{loader.total_steps():,}",
        "a step": f"{sizes.total} rows = {micro_batches}",
        "loss": type(parts.loss).__name__,
        "learning rate": f"{parts.base_lr:g}, {type(parts.scheduler).__name__}",
    }


def make_answers(r: Run, model: Model) -> Answers:
    """Returns what asks the model the prompts of train.prompts; a sharded model needs all ranks to answer."""
    from mft.model import generate

    engine, encoder = r.engine, r.data.encoder
    options: dict[str, Any] = {"max_new_tokens": r.settings.prompts_max_new_tokens, "do_sample": False}
    options |= {"together": engine.sharded, "device": engine.device}

    def answer(conversations: list[list[dict[str, str]]]) -> list[str]:
        model.eval()
        texts = engine.run_as_forward(lambda: generate.answer(model, encoder, conversations, **options))
        model.train()
        return texts

    prompts = read_prompts(Path(r.settings.prompts)) if r.settings.prompts else []
    return Answers(prompts if engine.is_main or engine.sharded else [], answer)


def restore_newest(r: Run, t: Trainer) -> None:
    """Restores the newest sound checkpoint; renames the damaged ones that are newer."""
    checkpoint, damaged = resume.newest_sound(r.folder, t.engine)
    if checkpoint is None and any(t.engine.gather(marked_steps(r.folder / "checkpoints"))):
        raise resume.none_sound(r.folder, damaged)
    for name, problem in damaged.items() if t.engine.is_main else ():
        moved = resume.set_aside(r.folder / "checkpoints" / name, "damaged")
        t.progress.show(f"{name} is damaged and passed over: {problem}; it is now checkpoints/{moved.name}")
    if t.engine.is_main:
        step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
        sample_losses.discard_after(r.folder, step)
    if checkpoint is None:
        seed_everything(r.settings.seed + 1 + t.engine.rank)  # dropout differs from rank to rank
        return
    exact = restore(checkpoint, t.state, t.engine, t.loss)
    note = "" if exact else ", saved by another number of ranks: same samples, losses equal to rounding"
    t.progress.show(f"resuming from {checkpoint.name}{note}")
    if t.engine.is_main and (lost := resume.lost_rows(checkpoint, t.state)):
        t.progress.show(lost)


def train_and_record(
    r: Run, t: Trainer, checkpoints: Checkpoints, export: ModelExport, answers: Answers, started: float
) -> RunStatus:
    """Resumes, trains, and writes the final model, the summary and the record of the trackers. started: a
    time.perf_counter()."""
    engine, folder = t.engine, r.folder
    status, tested = RunStatus.failed, final_test.Tested()
    with engine.patient():  # one rank may answer for all, and open the trackers
        answers.ask("before")
        restore_newest(r, t)
        t.counted_until = started
        tags = provenance.recorded(folder, run_tags(r)) if engine.is_main else {}
        t.tracker.open(folder, schema.plain(r.cfg), tags, t.state.step)
    try:
        # before the first step without the optimizer, which has no state yet
        if t.state.step < t.total_steps:
            checkpoints.require_room()
        t.progress.start(t.state.step, t.total_steps)
        status = fit(t)
        t.progress.close()
        if status is RunStatus.finished:
            write_final(folder, engine, export)
            with engine.patient():
                answers.ask("after")
            tested = final_test.evaluate(t, folder)  # last: it may load another checkpoint
        with engine.patient():  # at its end: other ranks exit with the code that the summary's status means
            result = summary.summarise(t, status, folder, tested)
            if t.sample_losses:
                t.sample_losses.prune(t.state.best, tested.step)
            if status is RunStatus.finished:
                t.tracker.log(t.state.step, summary.last_row(result))
            if engine.is_main and (no_pictures := summary.write(result, folder)):
                t.progress.show(no_pictures)
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
    if answers.prompts:
        t.progress.show(answers.table())
    summary.show(result, t, folder, tested)
    return status


def require_unchanged(
    cfg: DictConfig, folder: Path, parts: build.Components, of_tasks: Mapping[str, str] | None = None
) -> None:
    """Raises UserError where what was read is not what the folder's identity records.

    of_tasks: fingerprints of the tasks as they were read; the other files are hashed here. It is called after
    each reading, since files may change between the check of a run, or of a sweep, and its start.
    """
    if recorded := identity.identity_of(folder):
        of_files = inputs.files(cfg, parts.model, parts.peft)
        recorded.require({**(of_tasks or {}), **of_files}, schema.plain(cfg))


def run_tags(r: Run) -> dict[str, str]:
    """Returns what a tracker keeps beside the config: command, sweep, data, versions, host."""
    cfg, run_dir = r.cfg, r.folder
    record, recorded = read_json(run_dir / "overrides.json"), identity.identity_of(run_dir)
    overrides, plugins = record.texts("overrides"), record.texts("plugins")
    command = repetition.command(overrides, record.text("folder"), record.texts("search"), plugins)
    sizes = {task: counts["splits"] for task, counts in read_json(run_dir / "report" / "data.json").items()}
    tags = provenance.tags(r.engine.device.type, r.engine.world) | {
        "name": record.text("name"),
        "command": command,
        "overrides": " ".join(overrides),
        "data_sizes": json.dumps(sizes),
        "total_steps": str(int(read_json(run_dir / "plan.json").number("total_steps") or 0)),
        "identity": recorded.extended if recorded else "",
        "data_fingerprint": record.text("data"),
        "run_folder": str(run_dir),
    }
    if recorded:
        tags["tasks"] = json.dumps(recorded.tasks)
        for name in recorded.fingerprints.keys() & set(identity.CONTENTS):
            tags[provenance.fingerprint_tag(name)] = recorded.fingerprints[name]
    tags |= {group: cfg.choices[group] for group in ("model", "peft", "dist", "loss") if group in cfg.choices}
    if record.text("sweep"):
        tags |= {"sweep": record.text("sweep"), "job": record.text("label") or tags["overrides"]}
    return tags
