"""The order of events in a training step. Everything the loop calls is named here, in the open; there are no callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.batch import Batch, Counts
from mft.errors import UserError
from mft.loss.base import TaskLoss, task_sums
from mft.metrics import mean_of_tasks, task_means

if TYPE_CHECKING:
    import torch


@dataclass
class State:
    """Where a run is; saved with every checkpoint, plain values only."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # rows of this epoch's order that are done
    passes: float = 0.0  # epochs done, with fraction
    best_loss: float = math.inf
    best_step: int = 0
    stalled: int = 0  # validations since the best one
    first_valid: dict[str, float] = field(default_factory=dict)
    last_valid: dict[str, float] = field(default_factory=dict)
    valid_step: int = 0  # the step of last_valid
    best_valid: dict[str, float] = field(default_factory=dict)
    best_saved_loss: float = math.inf  # of the checkpoints whose step was validated
    best_saved_step: int = 0

    as_dict = asdict


@dataclass
class StepData:
    """The micro-batches of one rank for one optimizer step, and where the data stands after it."""

    batches: list[Batch]
    epoch: int
    position: int
    passes: float


@dataclass
class Training:
    """What the loop works on; put together by mft.run."""

    engine: Any
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: TaskLoss
    names: Sequence[str]
    data: Callable[[State], Iterator[StepData]]  # from where the state stands, without end
    learning_rate: Callable[[int], float]
    validation: Any  # an Evaluator
    probe: Callable[[int], torch.Tensor]  # per-task validation losses of a small draw before a step
    save: Callable[[State], Path]  # all ranks
    meter: Any
    tracker: Any
    progress: Any
    settings: Any
    total: int
    stop: Callable[[], bool]
    origin: Callable[[tuple[int, int]], str]  # names a sample: file:line
    state: State = field(default_factory=State)


def fit(t: Training) -> str:
    """Runs the steps that are left; returns "finished", or "stopped" when a rank was asked to stop (a checkpoint is saved).

    Order of events in a step: counts over all ranks, probe, statistics, forward and backward of each share, update, repeat,
    report, validate, save. Raises UserError on a non-finite loss or gradient, on all ranks.
    """
    state, settings, status = t.state, t.settings, "finished"
    if state.step == 0 and settings.eval_at_start:
        validate(t)
    learned: dict[str, float] = {}
    t.module.train()
    for data in t.data(state) if state.step < t.total else ():
        step = state.step + 1
        counts = Counts.from_tensor(t.engine.sum(Counts.of(data.batches, len(t.names), t.stop()).tensor()))
        batches = [batch.to(t.engine.device) for batch in data.batches]
        if t.loss.wants_probe(step):
            learned |= t.loss.learn(step, valid_K=t.probe(step))
        statistics = step_statistics(t, batches) if t.loss.needs_statistics else None

        lr = t.learning_rate(step)
        for group in t.optimizer.param_groups:
            group["lr"] = lr
        losses, sums_2K = [], 0.0
        for i, batch in enumerate(batches):
            with t.engine.accumulating(last=i == len(batches) - 1):
                nll_BT, router = forward(t, batch)
                share = t.loss.share(nll_BT, batch, counts, statistics)
                t.engine.backward(share + router / max(1.0, counts.micro_batches))
            losses.append(nll_BT.detach())
            micro_2K = task_sums(losses[-1], batch, len(t.names))
            sums_2K = sums_2K + micro_2K
            t.meter.micro_batch(share, micro_2K, batch)
        grad_norm = t.engine.step(settings.max_grad_norm)
        if not math.isfinite(grad_norm) and not t.engine.skipped:
            raise UserError(non_finite(t, step, batches, losses))
        t.meter.step(grad_norm, counts)

        if t.loss.wants_train(step):
            learned |= t.loss.learn(step, train_K=task_means(t.engine.sum(sums_2K)).cpu())
        if t.loss.wants_repeat(step):
            learned |= t.loss.learn(step, repeat_K=repeated(t, batches))

        state.step, state.epoch, state.position, state.passes = step, data.epoch, data.position, data.passes
        if counts.stop:
            status = "stopped"
        ending = step >= t.total or status == "stopped"
        t.progress.advance(step)
        if step % settings.log_every == 0 or ending:
            values = t.meter.read(t.engine) | learned | {"lr": lr, "epoch": state.passes}
            t.tracker.log(step, values)
            t.progress.report(step, values)
        improved = False
        if status == "finished" and (ending or every(step, settings.eval_every)):
            improved = validate(t)
            ending = ending or (settings.early_stopping and state.stalled >= settings.early_stopping_stall_num)
        if ending or every(step, settings.save_every) or (improved and settings.early_stopping):
            if state.valid_step == step and mean_of_tasks(state.last_valid) < state.best_saved_loss:
                state.best_saved_loss, state.best_saved_step = mean_of_tasks(state.last_valid), step
            t.save(state)
        if ending:
            break
    return status


def every(step: int, interval: int | None) -> bool:
    """Whether something done every `interval` steps (null = never) is due."""
    return bool(interval) and step % interval == 0


def forward(t: Training, batch: Batch) -> tuple[torch.Tensor, Any]:
    """Returns (nll_BT, router loss) of the model on one micro-batch."""
    return t.module(batch.ids_BT, batch.target_BT, batch.position_BT, batch.sample_BT)


def step_statistics(t: Training, batches: Sequence[Batch]) -> torch.Tensor:
    """Returns the loss's statistics of the whole step: a pass without gradient, with the dropout masks that follow."""
    import torch

    devices = [t.engine.device] if t.engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        local = sum(t.loss.statistics(forward(t, batch)[0], batch) for batch in batches)
    return t.engine.sum(local)


def repeated(t: Training, batches: Sequence[Batch]) -> torch.Tensor:
    """Returns the per-task losses of the same micro-batches after the update; draws no random number that training sees."""
    import torch

    devices = [t.engine.device] if t.engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        sums_2K = sum(task_sums(forward(t, batch)[0], batch, len(t.names)) for batch in batches)
    return task_means(t.engine.sum(sums_2K)).cpu()


def validate(t: Training) -> bool:
    """Validates every task, logs it, keeps count of the best and of the stall; returns whether it is the best so far."""
    state = t.state
    with t.progress.validating():
        losses = t.validation.by_name(t.module)
    if not losses:
        return False
    mean = mean_of_tasks(losses)
    t.tracker.log(state.step, {"valid/loss": mean} | {f"valid/loss/{name}": value for name, value in losses.items()})
    t.progress.validated(state.step, losses)
    state.first_valid = state.first_valid or losses
    state.last_valid, state.valid_step = losses, state.step
    if mean < state.best_loss:
        state.best_loss, state.best_step, state.stalled, state.best_valid = mean, state.step, 0, losses
        return True
    state.stalled += 1
    return False


def non_finite(t: Training, step: int, batches: Sequence[Batch], losses: Sequence[torch.Tensor]) -> str:
    """Returns the sentence for a non-finite step: the tasks and samples whose loss is not finite on this rank."""
    import torch

    culprits: dict[tuple[int, int], None] = {}
    for batch, nll_BT in zip(batches, losses, strict=True):
        for number in torch.unique(batch.sample_BT[~torch.isfinite(nll_BT)]).tolist():
            culprits[batch.samples[number]] = None
    named = "; ".join(f"task {t.names[task]}, {t.origin((task, index))}" for task, index in list(culprits)[:5])
    if named:
        reason = f"the loss is not finite for: {named}"
    else:
        reason = "the losses of this rank are finite, the gradient is not (overflow, or a loss on another rank)"
    return (
        f"Step {step} has a non-finite loss or gradient and was not applied: {reason}. "
        "A lower optimizer.lr, longer scheduler.warmup or train.precision=fp32 often helps; the last checkpoint is intact."
    )
