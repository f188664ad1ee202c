"""One run, top to bottom: data, engine, model, loop, final model, summary. Every rank executes it."""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft import run_folder
from mft.config import inputs
from mft.config.build import check_validation, component, learning_rate
from mft.config.identity import CONTENTS
from mft.config.schema import Train, batch_sizes, typed
from mft.data import mixture, report
from mft.data.datasets import dataset
from mft.data.loader import Feed
from mft.data.settings import DataSettings
from mft.files.checksums import require_sound
from mft.hardware import quiet_without_gpu
from mft.tracking.base import FanOut, Jsonl, Tracker
from mft.training import summary
from mft.training.checkpoint import Checkpoints, restore, write_final
from mft.training.loop import Training, fit
from mft.training.metrics import Meter, flops_per_token
from mft.training.progress import Silent, Terminal, settings_table
from mft.training.provenance import fingerprint_tag, tags
from mft.training.resume import all_damaged, newest_sound, set_aside
from mft.training.sample_answers import Answers, read_prompts
from mft.training.validate import Evaluator


def run(
    cfg: DictConfig,
    run_dir: Path,
    stop: Callable[[], bool],
) -> str:
    """Runs, or goes on with, the run of a frozen config; returns finished or stopped.

    stop: whether this rank was asked to end after the current step.
    """
    from mft.model import generate
    from mft.model.attention import described
    from mft.model.export import save_final
    from mft.model.introspect import base_of
    from mft.model.peft import summary as trained_weights
    from mft.model.peft.full import compute_dtype
    from mft.model.token_loss import TokenLoss

    started = time.perf_counter()
    quiet_libraries()
    cfg = typed(cfg)
    train, data = OmegaConf.to_object(cfg.train), OmegaConf.to_object(cfg.data)  # plain values for the floors below
    assert isinstance(train, Train) and isinstance(data, DataSettings)

    def make(path: str) -> Any:
        return component(cfg, path)

    family, peft, optim, scheduler, loss = (make(p) for p in ("model", "peft", "optimizer", "scheduler", "loss"))
    precision = train.precision.value
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank of each machine tokenises, before any process group
    known = dataset(cfg, data, family, make, first)
    tasks, names, stores, encoder, tokenizer = known.tasks, known.names, known.stores, known.encoder, known.tokenizer
    require = requirement(cfg, run_dir, family, peft)
    require(known.fingerprints)
    prompts = read_prompts(Path(train.prompts)) if train.prompts else []

    engine = make("dist").start(precision)
    progress = Terminal(names) if engine.is_main else Silent()
    if engine.is_main:
        known.write_report(run_dir / "report")
    for table in report.tables(stores, names):
        progress.show(table)
    for note in report.notes(stores, names):
        progress.show(note)
    sizes = batch_sizes(train, engine.world)
    shares = [task.share for task in tasks]
    feed = Feed(stores, make("data.rows"), sizes, engine.rank, tokenizer.pad_token_id, train, data, shares)
    total, mixed = feed.total_steps(), feed.mixture(names)
    progress.show(mixture.table(mixed, data))
    if (warmup := getattr(scheduler, "warmup", 0)) >= 1 and warmup > total:
        progress.show(f"scheduler.warmup={warmup:g}: the learning rate does not reach its peak in {total:,} steps")
    if engine.is_main:
        run_folder.write_json(run_dir / "report" / "mixture.json", mixed)
        run_folder.write_json(run_dir / "plan.json", {"total_steps": total, "tasks": names})
    weights, valid_counts = [task.weight for task in tasks], feed.valid_counts(len(tasks))
    check_validation(train, loss, dict(zip(names, valid_counts, strict=True)))
    loss.start(names, weights)
    loss.planned(total, valid_counts)

    seed_everything(train.seed)  # the same first adapters on every rank
    computing = compute_dtype(precision)
    if first and Path(family.source()).is_dir():  # a model that mft wrote; of others nothing is known
        require_sound(Path(family.source()))
    with engine.loading():
        model = family.model(peft.dtype(precision), peft.quantization(computing), compute_dtype=computing)
    model = peft.attach(model, family)
    require({})
    checkpointing = family.checkpoint(model)
    base_lr = learning_rate(optim, peft)
    module = TokenLoss(model, family)
    module, optimizer = engine.prepare(module, optim.build(module.named_parameters(), base_lr))

    def export(folder: Path) -> None:
        # of an adapter's run the base is not gathered: it is not saved
        weights = engine.full_state(module, trainable=base_of(model) is not model)
        if engine.is_main:
            save_final(engine.unwrap(module), tokenizer, folder, state_dict=weights)

    keep = train.keep if train.keep is not None else peft.default_checkpoint_limit
    write_model = export if engine.gather_on_save else ignore
    checkpoints = Checkpoints(run_dir, engine, loss, write_model, keep, train.keep_task_best)
    tracker = FanOut([Jsonl(), *(make(f"tracking.{name}") for name in cfg.tracking)]) if engine.is_main else Tracker()
    t = Training(
        engine=engine,
        module=module,
        optimizer=optimizer,
        loss=loss,
        names=names,
        weights=weights,
        data=feed.steps,
        learning_rate=lambda step: scheduler.lr(step, total, base_lr),
        validation=Evaluator(engine, names, feed.validation),
        probe=lambda step: Evaluator(engine, names, lambda: feed.probe(step, loss.probe_samples)).losses(module),
        save=checkpoints.save,
        meter=Meter(names, engine.device, flops_per_token(engine.unwrap(module)), train.peak_tflops),
        tracker=tracker,
        progress=progress,
        settings=train,
        total=total,
        stop=stop,
        origin=lambda sample: stores[sample[0]].origin(sample[1]),
    )

    def answer(conversations: list[list[dict[str, str]]]) -> list[str]:
        model.eval()
        options = {"do_sample": False, "max_new_tokens": train.prompts_max_new_tokens, "together": engine.sharded}
        said = engine.inside(lambda: generate.answer(model, encoder, conversations, **options))
        model.train()
        return said

    answers = Answers(prompts if engine.is_main or engine.sharded else [], answer)  # no rank has a divided model alone
    trained = peft.audit(model)
    if engine.is_main:
        run_folder.write_json(run_dir / "report" / "trained.json", trained_weights.as_json(trained))
    progress.show(trained_weights.table(trained))
    facts = {
        "steps": f"{total:,}",
        "a step": f"{sizes.total} rows = {sizes.per_device} x {sizes.accumulation} micro-batches x {sizes.world} ranks",
        "loss": type(loss).__name__,
        "learning rate": f"{base_lr:g}, {type(scheduler).__name__}",
        "precision": f"{precision} on {engine.device}, attention {described(base_of(model))}",
        "gradient checkpointing": "on" if checkpointing else "off",
    }
    progress.show(settings_table(list(facts.items()), "training"))

    answers.ask("before")
    resumed, damaged = newest_sound(run_dir, engine)
    if resumed is None and damaged:
        raise all_damaged(run_dir, damaged)
    for name, problem in damaged.items() if engine.is_main else ():
        moved = set_aside(run_dir / "checkpoints" / name, "damaged")
        progress.show(f"{name} is damaged and passed over: {problem}; it is now checkpoints/{moved.name}")
    if resumed is None:
        seed_everything(train.seed + 1 + engine.rank)  # dropout differs from rank to rank
    else:
        exact = restore(resumed, t.state, engine, loss)
        other = "" if exact else ", written on another number of ranks: the same samples, losses equal to rounding"
        progress.show(f"going on from {resumed.name}{other}")
    status = "failed"
    tracker.open(run_dir, plain(cfg), run_tags(cfg, run_dir), t.state.step)
    try:
        progress.start(t.state.step, total)
        status = fit(t)
        progress.close()
        if status == "finished":
            write_final(run_dir, engine, export)
            answers.ask("after")
        found = summary.summarise(t, status, run_dir, time.perf_counter() - started)
        if engine.is_main:
            summary.write(found, run_dir)
        engine.barrier()  # the other ranks leave with the code that the summary's status stands for
        if engine.is_main:
            answers.write(run_dir / "report" / "answers.md")
            for path in ("config.yaml", "summary.json", "report"):
                tracker.artifact(run_dir / path)
            for folder in sorted(run_dir.glob("checkpoints/step-*")):
                tracker.checkpoint(folder)
            tracker.model(run_dir / "final")
    except Exception as error:
        if engine.is_main:
            with suppress(OSError):  # the disk that ended the run may be full
                summary.failed(run_dir, error, t.state.step)
        raise
    finally:
        progress.close()
        tracker.close(status)
    if answers.prompts:
        progress.show(answers.table())
    summary.show(found, t, run_dir)
    engine.close()
    return status


def requirement(cfg: DictConfig, run_dir: Path, family: Any, peft: Any) -> Callable[[Mapping[str, str]], None]:
    """Returns a function that raises UserError where what was read is not what the folder's identity records.

    It is called after each reading, since files may change between the check of a run, or of a sweep, and its start. It
    takes the fingerprints of what was read and looks at the other files itself.
    """
    recorded = run_folder.identity_of(run_dir)

    def require(read: Mapping[str, str]) -> None:
        if recorded is not None:
            recorded.require({**read, **inputs.files(cfg, family, peft)}, plain(cfg))

    return require


def ignore(folder: Path) -> None:
    """Exports nothing."""


def quiet_libraries() -> None:
    """Silences what libraries say on every start and a person can do nothing about; errors stay."""
    quiet_without_gpu()
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\.")
    transformers.utils.logging.disable_progress_bar()


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch on every device."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Returns the config as nested dicts of plain values."""
    container = OmegaConf.to_container(cfg, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def run_tags(cfg: DictConfig, run_dir: Path) -> dict[str, str]:
    """Returns what a tracker keeps beside the config: what ran, in which sweep, on which data, versions, host."""
    known = run_folder.read_json(run_dir / "overrides.json")
    identity = run_folder.identity_of(run_dir)
    found = tags() | {
        "overrides": " ".join(known.texts("overrides")),
        "identity": identity.extended if identity else "",
        "data_fingerprint": known.text("data"),
        "run_folder": str(run_dir),
    }
    if identity:
        contents = {name: value for name, value in identity.fingerprints.items() if name in CONTENTS}
        found |= {fingerprint_tag(name): value for name, value in contents.items()}
        found |= {"tasks": json.dumps(identity.tasks)}
    found |= {group: option for group, option in cfg.choices.items() if group in ("model", "peft", "dist", "loss")}
    if known.text("sweep"):
        found |= {"sweep": known.text("sweep"), "job": known.text("label") or found["overrides"]}
    return found
