"""The order of events in a training step. Everything the loop calls is named here; there are no callbacks.

Shapes as in `mft.batch`: nll_BT are the token losses of a micro-batch, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import closing

from mft.batch import StepBatches
from mft.run_folder import RunStatus
from mft.training.nonfinite import propagate_nonfinite, update_applied
from mft.training.phases import Phase
from mft.training.trainer import Trainer
from mft.training.validate import forward


def fit(t: Trainer) -> RunStatus:
    """Trains the remaining steps; returns finished, or stopped after a stop request (checkpoint saved).

    Raises UserError, on all ranks, for a non-finite loss or gradient.
    """
    state = t.state
    if validate_before_training(t):
        return RunStatus.finished
    t.module.train()
    t.meter.resume(state.meter, t.engine)
    phases, left = t.meter.phases, t.total_steps - state.step
    steps = t.loader.steps(state.epoch, state.rows_consumed, left)
    # closed however it ends: a thread may be making the next step ready, and a profile may be on
    with closing(steps), closing(t.profile), phases.during(Phase.training):
        return train_on(t, phases.awaited(steps))


def train_on(t: Trainer, steps: Iterable[StepBatches]) -> RunStatus:
    """Trains steps until the run ends; see `fit`.

    Order of a step: counts over all ranks, probe, statistics, forward and backward of each micro-batch,
    update, what the loss learns, log, validate, save.

    The host waits for the device in no micro-batch, and in a step for the counts of other ranks, for the
    norm of the gradient, and for a logged row. A loss that learns from the step waits for its losses
    besides: once for `learn_before`, for `loss_statistics`, and for each of the two of `learn_after`. The
    loss scaler of fp16, DeepSpeed, and a mask that transformers makes wait on their own.
    """
    state, settings = t.state, t.settings
    for data in steps:
        step = state.step + 1
        # before the first backward: a share has the denominators of the whole step, over all ranks
        counts = t.count(data)
        batches = [batch.to(t.engine.device) for batch in data.batches]
        t.learn_before(step)
        statistics = t.loss_statistics(batches)
        lr = t.set_learning_rate(step)
        t.meter.begin_step()
        nll = []
        for number, batch in enumerate(batches, start=1):
            t.profile.before(step, number)
            with t.engine.accumulating(last=number == len(batches)):
                nll_BT, router = forward(t.module, batch)
                share = t.loss.share(nll_BT, batch, counts, statistics)
                # not linear in a batch, unlike the token losses: its mean over the step's micro-batches
                router = router / max(1.0, counts.micro_batches)
                t.engine.backward(propagate_nonfinite(share + router))
            nll.append(nll_BT.detach())
            t.meter.add(batch, nll[-1], share, router)
        grad_norm = t.engine.step(settings.max_grad_norm)
        if update_applied(t, step, grad_norm, batches, nll):
            t.meter.commit(counts, grad_norm)
            t.learn_after(step, batches)  # never from a step that changed nothing
        else:
            t.meter.skip(counts)
        state.advance(data, counts)
        t.progress.advance(step)
        t.profile.after(step)
        # counts.stop is a sum over ranks: all of them end after the same step, whichever was asked to stop
        complete, stopping = step == t.total_steps, bool(counts.stop)
        if complete or every(step, settings.log_every):  # a stopped run logs what it has when it is resumed
            t.log(lr)
        # A stopped run saves at once; the validation it leaves out is made when it is resumed.
        validated = not stopping and (complete or every(step, settings.eval_every))
        improved = validated and t.validate()
        stalled = validated and t.patience_exhausted()
        if stalled:  # before saving: what is killed after this checkpoint ends at it again
            state.stalled_of = t.total_steps
        ending = complete or stopping or stalled
        if ending or every(step, settings.save_every) or worth_keeping(t, improved):
            t.save_checkpoint()
        if ending:
            return RunStatus.stopped if stopping else RunStatus.finished
    return RunStatus.finished


def validate_before_training(t: Trainer) -> bool:
    """Makes the validation before the first step, or the one that a stopped run left out.

    Returns whether the run ends here: by this validation, or since it had stalled before it was killed.
    """
    import torch

    state, settings = t.state, t.settings
    if state.step == 0:
        if settings.eval_at_start and t.validate():
            # NaN: a task without validation samples
            losses = [state.best.last.get(name, math.nan) for name in t.names]
            t.loss.set_initial_losses(torch.tensor(losses, dtype=torch.float64))
        return False
    if state.stalled_of == t.total_steps:
        return True
    due = every(state.step, settings.eval_every) or state.step >= t.total_steps
    if not due or state.best.last_step >= state.step:
        return False
    improved = t.validate()
    # The checkpoint of the stop counts as a validated one only where one would be here without the stop: the
    # test reads the best of them.
    if every(state.step, settings.save_every) or worth_keeping(t, improved):
        state.best.mark_saved(state.step)
    return t.patience_exhausted()


def worth_keeping(t: Trainer, improved: bool) -> bool:
    """Whether the step is saved for what its validation found, though no checkpoint is due."""
    a_tasks_best = t.settings.keep_task_best and t.state.best.is_a_tasks_best(t.state.step)
    # after early stopping the best weights are what one wants, and `final/` has the last ones
    return (improved and t.settings.early_stopping) or a_tasks_best


def every(step: int, interval: int | None) -> bool:
    """Whether something done every `interval` steps (null: never) is due."""
    return interval is not None and step % interval == 0
