"""One run, top to bottom: data, engine, loader, model, training. Every rank executes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from mft.assembly.loader import make_loader
from mft.assembly.model import load_model, make_answers
from mft.assembly.start import Run, start
from mft.assembly.tags import run_tags
from mft.assembly.trainer import make_trainer
from mft.assembly.warning import warn_of_memory
from mft.config import schema
from mft.distributed.rng import seed_everything
from mft.files.json_file import write_json
from mft.hardware import quiet_libraries
from mft.run_folder import RunStatus
from mft.training import final_test, provenance, resume, sample_losses, summary
from mft.training.checkpoint import Checkpoints, ModelExport, marked_steps, restore, write_final
from mft.training.loop import fit
from mft.training.phases import Phase, Phases
from mft.training.sample_answers import Answers
from mft.training.trace import Trace
from mft.training.trainer import Trainer


def run(cfg: DictConfig, run_dir: Path, stop: Callable[[], bool], trace: Trace | None = None) -> RunStatus:
    """Runs, or resumes, the run of a frozen config; returns finished or stopped.

    stop: whether this rank was asked to end after the current step; trace: what to record of the steps.
    """
    phases = Phases()
    quiet_libraries()
    r = start(schema.typed(cfg), run_dir, phases)
    with r.engine.patient():  # few ranks read the weights, rank 0 alone writes the reports
        loader = make_loader(r, r.engine.world)
        warn_of_memory(r)
        phases.enter(Phase.loading)
        model = load_model(r)
        trainer, checkpoints, export = make_trainer(r, loader, model, stop)
    if trace:
        trainer.loader = trace.steps_of(trainer.loader, trainer.state, run_dir, r.engine.rank)
    status = train_and_record(r, trainer, checkpoints, export, make_answers(r, model))
    r.engine.close()
    return status


def ask(answers: Answers, when: str, t: Trainer) -> None:
    """Has the model answer, if there is anything to ask."""
    if answers.prompts:
        with t.meter.phases.during(Phase.answers):
            answers.ask(when)
            t.engine.barrier()  # one rank may answer for all: the wait of the others is no other phase's


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
    r: Run, t: Trainer, checkpoints: Checkpoints, export: ModelExport, answers: Answers
) -> RunStatus:
    """Resumes, trains, and writes the final model, the summary and the record of the trackers."""
    engine, folder, phases = t.engine, r.folder, r.phases
    status, tested = RunStatus.failed, final_test.Tested()
    with engine.patient():  # one rank may answer for all, and open the trackers
        ask(answers, "before", t)
        restore_newest(r, t)
        t.resume_time()
        tags = provenance.recorded(folder, run_tags(r)) if engine.is_main else {}
        t.tracker.open(folder, schema.plain(r.cfg), tags, t.state.step)
    try:
        # before the first step without the optimizer, which has no state yet
        if t.state.step < t.total_steps:
            checkpoints.require_room()
        if too_short := t.profile.choose(t.state.step, t.total_steps):
            t.progress.show(too_short)
        t.progress.start(t.state.step, t.total_steps)
        phases.enter(Phase.closing)  # what comes between the phases below: loading is over
        status = fit(t)
        t.progress.close()
        if status is RunStatus.finished:
            with phases.during(Phase.saving):
                write_final(folder, engine, export)
            with engine.patient():
                ask(answers, "after", t)
            with phases.during(Phase.validation):
                tested = final_test.evaluate(t, folder)  # last: it may load another checkpoint
        with engine.patient():  # at its end: other ranks exit with the code that the summary's status means
            if engine.is_main and (no_pictures := summary.draw(folder)):
                t.progress.show(no_pictures)
            result = summary.summarise(t, status, folder, tested)
            if t.sample_losses:
                t.sample_losses.prune(t.state.best, tested.step)
            if status is RunStatus.finished:
                t.tracker.log(t.state.step, summary.last_row(result))
            if engine.is_main:
                write_json(folder / "summary.json", result, durable=True)
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
