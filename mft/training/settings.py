"""The settings of the training loop, `train` in the config; conf/train.yaml holds their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mft.errors import check_choice, check_ranges, ranged

AUTO = "auto"
"""Of train.per_device_batch_size: what fits into memory."""


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass; trained weights are fp32 in all of them."""

    auto = "auto"
    """bf16 where the machine computes in it, else fp16 on a GPU and fp32 on a CPU."""
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class KeptLosses(StrEnum):
    """Which validations keep the losses of their single rows, in sample_losses/ of the run folder."""

    best = "best"
    """The first, the best and the last one, the test, and the best as of every checkpoint that is there."""
    all = "all"
    none = "none"


class KeptState(StrEnum):
    """Which checkpoints keep what a resume needs beyond the weights: the optimizer and the random states."""

    all = "all"
    last = "last"
    """The newest one; when it is complete, older ones become weights-only."""


@dataclass
class TrainSettings:
    """What the loop does and when: length, batch, precision, validation, checkpoints."""

    epochs: float = ranged(3.0, above=0)
    """Passes over the training data."""
    max_steps: int | None = ranged(None, min=1)
    """Optimizer steps; ends the run earlier than `epochs` would."""
    per_device_batch_size: int | str = ranged(4, min=1)
    """Rows (data=pack, concat) or samples (data=pad) of one micro-batch on one rank; auto: as many as fit."""
    per_device_eval_batch_size: int = ranged(4, min=1)
    """The same for validation."""
    global_batch_size: int | None = ranged(None, min=1)
    """Rows or samples of one optimizer step over all ranks; the accumulation is derived from it."""
    gradient_accumulation_steps: int | None = ranged(None, min=1)
    """Micro-batches of one step on each rank; null: 1, or derived. Not together with global_batch_size."""
    precision: Precision = Precision.auto
    """The frozen config of a run holds what `auto` was resolved to on its machine."""
    prefetch: bool = True
    """Make the next step's micro-batches ready, in a thread, while a step computes; false: between steps."""
    max_grad_norm: float | None = ranged(1.0, above=0)
    """Gradients are clipped to this norm; null: never."""
    deterministic: bool = False
    """GPU kernels that compute the same bits every time, slower; a CPU does so in any case."""
    seed: int = ranged(42, min=0)
    """Of the data order, the adapters' first weights and dropout."""
    log_every: int = ranged(10, min=1)
    """Steps between two logged rows."""
    eval_every: int | None = ranged(100, min=1)
    """Steps between two validations; null: only at the start and the end."""
    eval_at_start: bool = True
    """Validate before the first step, so that progress has a baseline."""
    eval_samples: int | None = ranged(None, min=1)
    """Validation samples per task; null: all of them."""
    sample_losses: KeptLosses = KeptLosses.best
    """Which validations keep the loss of every row, by which runs are compared row by row."""
    save_every: int | None = ranged(100, min=1)
    """Steps between two checkpoints; null: only at the end."""
    keep: int | None = ranged(None, min=1)
    """Newest checkpoints kept beside the best one; null: 3 with peft=full, else all."""
    save_state: KeptState = KeptState.all
    """Which checkpoints a run can be resumed from; the others hold the weights alone."""
    best: str = "mean"
    """How a validation is judged: mean, worst, weighted, or the name of one task (`mft.objective`)."""
    keep_task_best: bool = False
    """Also save whenever a task reaches its best validation loss, and keep each task's best checkpoint."""
    skip_nonfinite_steps: int = ranged(0, min=0)
    """Steps with a non-finite loss or gradient that are skipped with a warning before one ends the run."""
    early_stopping: bool = False
    """Stop when `best` has not improved for `early_stopping_stall_num` validations."""
    early_stopping_stall_num: int = ranged(3, min=1)
    """Validations without improvement that end the run."""
    resume: str = "auto"
    """auto (the newest unfinished run of this identity), never, a run folder, or RUN/checkpoints/step-N."""
    prompts: str | None = None
    """JSONL file of held-out conversations, answered before and after training."""
    prompts_max_new_tokens: int = ranged(64, min=1)
    """Length limit of those answers, in tokens."""
    peak_tflops: float | None = ranged(None, above=0)
    """Peak of one device in TFLOP/s, for speed/mfu and hfu; null: known GPUs only."""
    profile: bool = False
    """Record a few steps with torch's profiler, into profile/ of the run folder (`mft.training.profile`)."""

    def check(self) -> None:
        """Raises UserError for a number out of its range, and for a word that stands for none."""
        if str(size := self.per_device_batch_size).isdigit():  # of an environment variable it is a text
            self.per_device_batch_size = int(size)
        elif isinstance(size, str):
            check_choice("train.per_device_batch_size", size, (AUTO, "a whole number from 1 on"))
        check_ranges(self, "train")
