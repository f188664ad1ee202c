"""The order of events in a training step. Everything the loop calls is named here; there are no callbacks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.batch import Batch, Counts
from mft.errors import UserError
from mft.loss.base import TaskLoss, task_sums
from mft.training.metrics import criterion, mean_of_tasks, perplexity, task_means

if TYPE_CHECKING:
    import torch


@dataclass
class State:
    """Where a run is; saved with every checkpoint, plain values only."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # rows of this epoch's order that are done
    passes: float = 0.0  # epochs done, with fraction
    skipped: int = 0  # steps that were not applied because their loss or gradient was not finite
    best_loss: float = math.inf  # by train.best, like best_step, best_valid and best_saved
    best_step: int = 0
    stalled: int = 0  # validations since the best one
    first_valid: dict[str, float] = field(default_factory=dict)
    last_valid: dict[str, float] = field(default_factory=dict)
    valid_step: int = 0  # the step of last_valid
    best_valid: dict[str, float] = field(default_factory=dict)
    best_saved_loss: float = math.inf  # of the checkpoints whose step was validated
    best_saved_step: int = 0
    task_best_loss: dict[str, float] = field(default_factory=dict)
    task_best_step: dict[str, int] = field(default_factory=dict)
    task_saved_loss: dict[str, float] = field(default_factory=dict)  # of the checkpoints whose step was validated
    task_saved_step: dict[str, int] = field(default_factory=dict)
    learned: dict[str, float] = field(default_factory=dict)  # what the loss mode last reported; in every logged row
    meter: list[dict[str, Any]] = field(default_factory=list)  # of each rank, of the steps since the last logged row

    as_dict = asdict

    @classmethod
    def checked(cls, values: Any) -> State:
        """Returns the state that `as_dict` gave; a field that an earlier version did not write has its default.

        Raises ValueError for values of another shape.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__} where an object is expected")
        found = cls()
        for name, default in found.as_dict().items():
            if name not in values and name not in ("step", "epoch", "position", "passes"):
                continue
            value = values.get(name)
            kinds = (int, float) if isinstance(default, float) else type(default)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}")
            setattr(found, name, value)
        return found


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
    weights: Sequence[float]  # task.<name>.weight, for train.best=weighted
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
    """Runs the steps that are left; returns "finished", or "stopped" when a rank was asked to stop (and all saved).

    Order of events in a step: counts over all ranks, probe, statistics, forward and backward of each share, update,
    repeat, report, validate, save. Raises UserError on a non-finite loss or gradient, on all ranks.
    """
    import torch

    state, settings, status = t.state, t.settings, "finished"
    if state.step == 0 and settings.eval_at_start and validate(t):
        t.loss.begin(torch.tensor([state.last_valid.get(n, math.nan) for n in t.names], dtype=torch.float64))
    due = every(state.step, settings.eval_every) or state.step >= t.total
    if state.step and due and state.valid_step < state.step:
        validate(t)  # a run that was asked to stop at this step saved at once and left it out
        note_saved(t)
        if stalled(t):
            return status
    learned = state.learned
    t.module.train()
    t.meter.restart(state.meter, t.engine)
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
        nll: list[torch.Tensor] = []
        sums_2K = torch.zeros(2, len(t.names), dtype=torch.float64, device=t.engine.device)
        losses_2 = torch.zeros(2, dtype=torch.float64, device=t.engine.device)  # objective, router
        for i, batch in enumerate(batches):
            with t.engine.accumulating(last=i == len(batches) - 1):
                nll_BT, router = forward(t, batch)
                share = t.loss.share(nll_BT, batch, counts, statistics)
                router = router / max(1.0, counts.micro_batches)
                t.engine.backward(marked(share + router))
            nll.append(nll_BT.detach())
            sums_2K += task_sums(nll[-1], batch, len(t.names))
            losses_2 += torch.stack([share.detach(), router.detach()])
        grad_norm = t.engine.step(settings.max_grad_norm)

        if applied(t, step, grad_norm, batches, nll):
            t.meter.step(grad_norm, counts, data.batches, losses_2, sums_2K)
            if t.loss.wants_train(step):
                learned |= t.loss.learn(step, train_K=task_means(t.engine.sum(sums_2K)).cpu())
            if t.loss.wants_repeat(step):
                learned |= t.loss.learn(step, repeat_K=repeated(t, batches))
        else:
            t.meter.skip(data.batches)

        state.step, state.epoch, state.position, state.passes = step, data.epoch, data.position, data.passes
        if counts.stop:
            status = "stopped"
        ending = step >= t.total or status == "stopped"
        t.progress.advance(step)
        if step % settings.log_every == 0 or step >= t.total:  # a stopped run logs what it has when it is resumed
            values = t.meter.read(t.engine) | learned | {"lr": lr, "epoch": state.passes}
            t.tracker.log(step, values)
            t.progress.report(step, values)
        improved = False
        if status == "finished" and (ending or every(step, settings.eval_every)):
            improved = validate(t)
            ending = ending or stalled(t)
        keeping = (improved and settings.early_stopping) or (settings.keep_task_best and step in task_bests(state))
        if ending or every(step, settings.save_every) or keeping:
            note_saved(t)
            with t.meter.paused():
                state.meter = t.meter.state(t.engine)
                t.save(state)
        if ending:
            break
    return status


def every(step: int, interval: int | None) -> bool:
    """Whether something done every `interval` steps (null = never) is due."""
    return interval is not None and step % interval == 0


def stalled(t: Training) -> bool:
    """Whether early stopping ends the run."""
    return bool(t.settings.early_stopping and t.state.stalled >= t.settings.early_stopping_stall_num)


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
    """Returns the per-task losses of the same micro-batches after the update; training sees no random number of it."""
    import torch

    devices = [t.engine.device] if t.engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        sums_2K = sum(task_sums(forward(t, batch)[0], batch, len(t.names)) for batch in batches)
    return task_means(t.engine.sum(sums_2K)).cpu()


def validate(t: Training) -> bool:
    """Validates every task, logs it, keeps count of the best and of the stall; returns whether it is the best yet.

    Raises UserError, on all ranks, where no task's loss is finite.
    """
    state = t.state
    with t.meter.paused(), t.progress.validating():
        losses = t.validation.by_name(t.module)
    if not losses:
        return False
    judged = criterion(losses, t.settings.best, dict(zip(t.names, t.weights, strict=True)))
    values = {"valid/loss": mean_of_tasks(losses)}
    if t.settings.best in ("worst", "weighted"):
        values[f"valid/{t.settings.best}"] = judged
    for name, loss in losses.items():
        values |= {f"valid/loss/{name}": loss, f"valid/perplexity/{name}": perplexity(loss)}
        if loss < state.task_best_loss.get(name, math.inf):
            state.task_best_loss[name], state.task_best_step[name] = loss, state.step
    t.tracker.log(state.step, values)
    t.progress.validated(state.step, losses)
    if not any(math.isfinite(loss) for loss in losses.values()):
        raise UserError(
            f"The validation after step {state.step} has no finite loss for any task: the weights are no longer of "
            "use and were not saved. A lower optimizer.lr, longer scheduler.warmup or train.precision=fp32 often helps."
        )
    state.first_valid = state.first_valid or losses
    state.last_valid, state.valid_step = losses, state.step
    if judged < state.best_loss:
        state.best_loss, state.best_step, state.stalled, state.best_valid = judged, state.step, 0, losses
        return True
    state.stalled += 1
    return False


def task_bests(state: State) -> set[int]:
    """Returns the steps at which a task has its best validation loss so far."""
    return set(state.task_best_step.values())


def note_saved(t: Training) -> None:
    """Notes which of the checkpoints is the best, and the best of each task, if the step being saved was validated."""
    state = t.state
    if state.valid_step != state.step or not state.last_valid:
        return
    judged = criterion(state.last_valid, t.settings.best, dict(zip(t.names, t.weights, strict=True)))
    if judged < state.best_saved_loss:
        state.best_saved_loss, state.best_saved_step = judged, state.step
    for name, loss in state.last_valid.items():
        if loss < state.task_saved_loss.get(name, math.inf):
            state.task_saved_loss[name], state.task_saved_step[name] = loss, state.step


def marked(objective: torch.Tensor) -> torch.Tensor:
    """Returns the objective, with a gradient that is not finite where the objective is not.

    The gradient of a loss of inf may be finite. This way the exchange of gradients tells every rank, without another
    exchange and without waiting for the device; a finite objective and its gradient are multiplied by exactly 1.
    """
    return objective * (1 + 0 * objective.detach())


def applied(t: Training, step: int, grad_norm: float, batches: Sequence[Batch], nll: Sequence[torch.Tensor]) -> bool:
    """Returns whether the step's update happened; all ranks agree.

    A non-finite step is not applied. Of those at most train.skip_nonfinite_steps are passed over with a warning, the
    next one raises UserError on all ranks. An overflow of the gradients that the fp16 loss scaler answers is neither.
    """
    if math.isfinite(grad_norm):
        return True
    culprits = non_finite_samples(t, batches, nll)
    if t.engine.skipped and not culprits:
        return False
    message = non_finite(t, step, culprits)
    if t.state.skipped >= t.settings.skip_nonfinite_steps:
        raise UserError(message)
    t.state.skipped += 1
    if t.engine.is_main:
        warnings.warn(f"{message} Skipped, {t.state.skipped} of {t.settings.skip_nonfinite_steps}.", stacklevel=2)
    return False


NAMED = 5
"""Samples of each rank that an error names at most."""


def non_finite_samples(t: Training, batches: Sequence[Batch], nll: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Returns (task, index) of samples whose loss is not finite, of all ranks; all ranks call it and get the same."""
    import torch

    found: dict[tuple[int, int], None] = {}
    for batch, nll_BT in zip(batches, nll, strict=True):
        for number in torch.unique(batch.sample_BT[~torch.isfinite(nll_BT)]).tolist():
            found[batch.samples[number]] = None
    table = torch.zeros(t.engine.world, NAMED, 2, dtype=torch.float64)
    for place, (task, index) in enumerate(list(found)[:NAMED]):
        table[t.engine.rank, place] = torch.tensor([task + 1, index])
    rows = t.engine.sum(table).flatten(0, 1).long().tolist()
    return [(task - 1, index) for task, index in rows if task]


def non_finite(t: Training, step: int, culprits: Sequence[tuple[int, int]]) -> str:
    """Returns the sentence for a non-finite step."""
    named = "; ".join(f"task {t.names[task]}, {t.origin((task, index))}" for task, index in culprits)
    reason = (
        f"the loss is not finite for: {named}" if named else "every loss is finite, the gradient is not (an overflow)"
    )
    return (
        f"Step {step} has a non-finite loss or gradient and was not applied: {reason}. "
        "A lower optimizer.lr, longer scheduler.warmup or train.precision=fp32 often helps; the last checkpoint is "
        "intact."
    )
