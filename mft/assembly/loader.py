"""What a run takes of its data: the loader of its micro-batches, and what a step is made of."""

from __future__ import annotations

from typing import Any

from mft.assembly.start import Run
from mft.config import build, schema, validate
from mft.data import mixture, report
from mft.data.loader import BatchLoader
from mft.files.json_file import write_json


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


def plan(parts: build.Components, loader: BatchLoader) -> dict[str, str]:
    """Returns how long the run is and what a step of it is made of, in words."""
    sizes = loader.sizes
    micro_batches = f"{sizes.per_device} x {sizes.accumulation} micro-batches x {sizes.world} ranks"
    if not sizes.found:
        micro_batches = f"{sizes.accumulation} x {sizes.world} ranks, in micro-batches that fit there"
    return {
        "steps": f"{loader.total_steps():,}",
        "a step": f"{sizes.total} rows = {micro_batches}",
        "loss": type(parts.loss).__name__,
        "learning rate": f"{parts.base_lr:g}, {type(parts.scheduler).__name__}",
    }
