"""Settings that the user set but that have no effect in this run: a table of rules with their reasons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from omegaconf import DictConfig, OmegaConf

from mft.config.conditions import (
    IN_A_SWEEP,
    INLINE,
    NOT_PADDED,
    OF_DORA,
    OF_DROPOUT,
    OF_PACKED,
    ONE_BY_ONE,
    ONE_MACHINE,
    ONE_RANK,
    ONE_TASK,
    OUTSIDE_A_SWEEP,
    TRACKING_URI,
    WITHOUT_GPU,
    WITHOUT_VALIDATION,
    Reason,
    Run,
    adds_no_tokens,
    ends_before,
    ends_before_a_profile,
    in_length_groups,
    keeps_one_checkpoint,
    one_micro_batch,
    reads_a_folder,
    shown,
    unless,
    when,
    where,
    where_given,
)
from mft.config.given_keys import is_default
from mft.config.inputs import under
from mft.training.profile import SKIPPED

RULES: tuple[tuple[str, tuple[Reason, ...]], ...] = (
    ("train.early_stopping_stall_num", (unless("train.early_stopping", True),)),
    ("train.deterministic", (WITHOUT_GPU,)),
    ("train.prompts_max_new_tokens", (when("train.prompts", None),)),
    ("launch.prune", (OUTSIDE_A_SWEEP, WITHOUT_VALIDATION)),
    ("launch.prune_after", (OUTSIDE_A_SWEEP, unless("launch.prune", True), WITHOUT_VALIDATION)),
    ("launch.fail_fast sweep", (OUTSIDE_A_SWEEP,)),
    ("train.resume output_dir", (IN_A_SWEEP,)),
    ("train.eval_every", (WITHOUT_VALIDATION, ends_before("train.eval_every"))),
    ("train.eval_at_start train.eval_samples train.per_device_eval_batch_size", (WITHOUT_VALIDATION,)),
    ("train.best train.keep_task_best", (WITHOUT_VALIDATION,)),
    ("train.save_state", (where(keeps_one_checkpoint, "train.keep=1 keeps one checkpoint"),)),
    ("train.save_every", (ends_before("train.save_every"),)),
    ("train.log_every", (ends_before("train.log_every"),)),
    ("train.profile", (where(ends_before_a_profile, f"the first {SKIPPED} steps are not recorded"),)),
    ("launch.jobs", (OUTSIDE_A_SWEEP, INLINE)),
    ("launch.shutdown_seconds", (INLINE,)),
    ("launch.main_address launch.node_rank launch.rdzv_endpoint launch.local_addr", (ONE_MACHINE,)),
    ("launch.join_seconds launch.lost_seconds", (ONE_MACHINE,)),
    ("launch.main_port", (ONE_MACHINE, when("launch.main_address", None))),
    ("data.pad_to", (NOT_PADDED,)),
    ("data.length_group", (NOT_PADDED, when("data.pad_to", "seq_length"))),
    ("data.window", (where(in_length_groups, "data=pad makes windows of 50 x data.length_group samples"),)),
    ("data.mixture task.*.weight", (ONE_TASK,)),
    ("data.mixture_by", (when("data.mixture", "natural"),)),
    ("data.mixture_temperature", (unless("data.mixture", "temperature"),)),
    ("model.revision", (where(reads_a_folder, "model.path is a folder"),)),
    ("model.pad_to_multiple_of", (where(adds_no_tokens, "model.add_tokens is empty"),)),
    (
        "peft.rank peft.alpha peft.dropout peft.targets peft.experts peft.router peft.modules_to_save "
        "peft.use_dora peft.use_rslora peft.init",
        (where_given("peft.path"),),
    ),
    ("peft.fused", (ONE_BY_ONE, OF_DORA, OF_DROPOUT, OF_PACKED)),
    ("peft.quant_type peft.double_quant peft.compute_dtype peft.storage_dtype", (when("peft.bits", 8),)),
    ("loss.probe_samples", (when("loss.source", "train"),)),
    (
        "dist.find_unused_parameters dist.overlap_comm dist.reduce_bucket_size dist.allgather_bucket_size "
        "dist.prefetch_bucket_size dist.persistence_threshold dist.timeout_minutes",
        (ONE_RANK,),
    ),
    ("dist.reduce_every_micro_batch", (ONE_RANK, where(one_micro_batch, "a step has one micro-batch"))),
    ("tracking.mlflow.store", (where_given("tracking.mlflow.uri"), TRACKING_URI)),
    ("choices", (where(lambda _: True, "it is filled in by mft"),)),
)
"""Keys (`*`: every task) → reasons for which they may have no effect; the first that holds is reported."""


def without_effect(cfg: DictConfig, world: int, given: Sequence[str], sweep: bool = False) -> list[str]:
    """Returns a sentence for every setting among `given` keys that differs from its default and has no
    effect.

    cfg: resolved and typed; world: number of ranks; given: keys set by the person; sweep: whether it is a job
    of one.
    """
    run, notes = Run(cfg, world, sweep), []
    for key, reasons in rules(cfg.task):
        # Whoever repeats a default asks for nothing.
        if not under(key, given) or OmegaConf.select(cfg, key) is None or is_default(cfg, key):
            continue
        if reason := next(filter(None, (reason(run) for reason in reasons)), ""):
            notes.append(f"{key}={shown(run.value(key))} has no effect: {reason}.")
    if not sweep and (note := _peak_not_reached(run)) and under("scheduler.warmup", given):
        notes.append(note)
    return notes


def rules(tasks: Iterable[object]) -> Iterator[tuple[str, tuple[Reason, ...]]]:
    """Yields every key that may have no effect, those of each task included, with its reasons."""
    for keys, reasons in RULES:
        for key in keys.split():
            for name in tasks if "*" in key else ("",):
                yield key.replace("*", str(name)), reasons


def _peak_not_reached(run: Run) -> str:
    warmup, last = run.value("scheduler.warmup"), run.cfg.train.max_steps
    if not (warmup and last and warmup >= 1 and warmup > last):
        return ""
    return (
        f"scheduler.warmup={warmup:g}: the learning rate does not reach its peak by train.max_steps={last}."
    )
