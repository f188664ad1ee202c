"""The objects of the training loop and the individual actions of a step; `mft.assembly` connects them.

Shapes, besides those of `mft.batch`: `x_K` one value for each task, `x_2K` the rows [sum of token losses,
trained tokens] of each task, S the sums that a loss asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mft.batch import Batch, StepBatches, StepCounts
from mft.distributed.engine import Engine
from mft.errors import UserError
from mft.loss.base import TaskLoss, task_sums
from mft.objective import criterion, mean_of_tasks, perplexity
from mft.tracking.base import Tracker
from mft.training.metrics import Meter, task_means
from mft.training.phases import Phase
from mft.training.profile import StepProfile
from mft.training.progress import Terminal
from mft.training.sample_losses import SampleLosses, SampleSums
from mft.training.settings import TrainSettings
from mft.training.state import State
from mft.training.validate import Evaluator, forward

if TYPE_CHECKING:
    import torch


class StepSource(Protocol):
    """Where the micro-batches of each step come from (`mft.data.loader`)."""

    def steps(self, epoch: int, rows_consumed: int, count: int) -> Generator[StepBatches]:
        """Yields this rank's micro-batches of the next `count` steps from a place in the data on."""
        ...


ADVICE = "A lower optimizer.lr, longer scheduler.warmup or train.precision=fp32 often helps"
"""What to do about a run that diverges."""


@dataclass
class Trainer:
    """One rank's training: every method is called by all ranks alike."""

    engine: Engine
    module: torch.nn.Module
    """The prepared module; its call returns (nll_BT, router loss)."""
    optimizer: torch.optim.Optimizer
    loss: TaskLoss
    names: Sequence[str]
    """Of the K tasks, in order."""
    weights: Sequence[float]
    """task.<name>.weight, for train.best=weighted."""
    loader: StepSource
    learning_rate: Callable[[int], float]
    """Step (from 1) → the learning rate of its update."""
    evaluator: Evaluator
    probe: Callable[[int], torch.Tensor]
    """Step → validation losses [K] of a small draw before it."""
    save: Callable[[State], Path]
    meter: Meter
    tracker: Tracker
    progress: Terminal
    settings: TrainSettings
    total_steps: int
    stop_requested: Callable[[], bool]
    """Whether this rank was asked to end after the current step."""
    origin: Callable[[tuple[int, int]], str]
    """(task, index) of a sample → file:line."""
    test: Evaluator | None = None
    """Evaluates the test split; None: no row is in it."""
    sample_losses: SampleLosses | None = None
    """Keeps the losses of single rows; None: they are not kept."""
    profile: StepProfile = field(default_factory=StepProfile)
    state: State = field(default_factory=State)

    def count(self, data: StepBatches) -> StepCounts:
        """Returns the denominators of a step's losses over all ranks, and how many ranks were asked to stop.

        One all-reduce for both: the counts are exact whatever each rank's micro-batches hold.
        """
        local = StepCounts.of(data.batches, len(self.names), self.stop_requested())
        return StepCounts.from_tensor(self.engine.sum(local.tensor()))

    def set_learning_rate(self, step: int) -> float:
        """Sets the learning rate of a step's update and returns it."""
        # a function of the step, not a torch scheduler: there is no state to save and resume
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def loss_statistics(self, batches: Sequence[Batch]) -> torch.Tensor | None:
        """Returns sums [K, S] of the step for modes that are not linear in a task's loss, else None."""
        if not self.loss.needs_statistics:
            return None
        return self._second_pass(self.loss.statistics, batches)

    def learn_before(self, step: int) -> None:
        """Lets an adaptive loss learn from a small validation before a step, where it wants one."""
        if self.loss.wants_probe(step):
            self.state.learned |= self.loss.learn(step, valid_K=self.probe(step))

    def learn_after(self, step: int, batches: Sequence[Batch]) -> None:
        """Lets an adaptive loss learn from the losses of an applied step, before and after its update."""
        if self.loss.wants_train(step):
            # sums of this step alone, which the meter has anyway
            losses_K = task_means(self.engine.sum(self.meter.step_sums_2K))
            self.state.learned |= self.loss.learn(step, train_K=losses_K)
        if self.loss.wants_repeat(step):
            sums_2K = self._second_pass(partial(task_sums, tasks=len(self.names)), batches)
            self.state.learned |= self.loss.learn(step, repeat_K=task_means(sums_2K))

    def _second_pass(
        self, sums_of: Callable[[torch.Tensor, Batch], torch.Tensor], batches: Sequence[Batch]
    ) -> torch.Tensor:
        """Returns sums_of(nll_BT, batch) without gradient, added up over the micro-batches of all ranks.

        The random numbers of training stay as they were: the pass sees the dropout masks that the step has.
        """
        import torch

        devices = [self.engine.device] if self.engine.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            sums = [sums_of(forward(self.module, batch)[0], batch) for batch in batches]
            local = reduce(torch.add, sums)  # in the order of the micro-batches, to the bit
        return self.engine.sum(local)

    def log(self, lr: float) -> None:
        """Logs what was measured since the last logged row."""
        state = self.state
        values = self.meter.read(self.engine) | state.learned | {"lr": lr, "epoch": state.epochs_done}
        state.learned = {}  # a row holds what was learned since the row before
        self.tracker.log(state.step, values)
        self.progress.report(state.step, values)
        self.engine.barrier()  # rank 0 alone has written

    def validate(self) -> bool:
        """Validates every task and logs it; returns whether it is the best validation so far.

        Raises UserError, on all ranks, where no task's loss is finite.
        """
        step, best = self.state.step, self.settings.best
        losses = self.evaluate(self.evaluator, "valid", step)
        if not losses:
            return False
        value = criterion(losses, best, dict(zip(self.names, self.weights, strict=True)))
        values = {"valid/loss": mean_of_tasks(losses)}
        if best in ("worst", "weighted"):
            values[f"valid/{best}"] = value
        for name, loss in losses.items():
            values |= {f"valid/loss/{name}": loss, f"valid/perplexity/{name}": perplexity(loss)}
        self.tracker.log(step, values)
        self.progress.validated(step, losses)
        self.engine.barrier()  # as in `log`
        # after logging, so that the record shows where it diverged
        if not any(math.isfinite(loss) for loss in losses.values()):
            problem = f"The validation after step {step} has no finite loss for any task: training diverged"
            raise UserError(f"{problem}; these weights were not saved. {ADVICE}.")
        return self.state.best.update(step, losses, value)

    def evaluate(self, evaluator: Evaluator, split: str, step: int) -> dict[str, float]:
        """Returns the losses by task of the split valid or test; those of its rows are kept as of `step`."""
        with self.meter.phases.during(Phase.validation), self.progress.evaluating(split):
            sums = SampleSums() if self.sample_losses else None
            losses = evaluator.by_name(self.module, sums)
            if self.sample_losses and sums and losses:
                self.sample_losses.write(split, step, sums)
        return losses

    def patience_exhausted(self) -> bool:
        """Whether early stopping ends the run."""
        settings = self.settings
        return settings.early_stopping and self.state.best.stalled >= settings.early_stopping_stall_num

    def save_checkpoint(self) -> None:
        """Saves a checkpoint of the current step; its time does not count as training."""
        # first: the state in the checkpoint says that this step has one
        self.state.best.mark_saved(self.state.step)
        with self.meter.phases.during(Phase.saving):
            self.state.meter = self.meter.state(self.engine)
            self.count_time()
            self.save(self.state)
            if self.sample_losses:
                self.sample_losses.prune(self.state.best)
            self.engine.barrier()

    def count_time(self) -> None:
        """Brings the time and memory of the run in its state up to date; all ranks call it."""
        phases = self.meter.phases
        self.state.costs = phases.state(self.engine)
        self.state.seconds = phases.total()

    def resume_time(self) -> None:
        """Goes on from the time and memory in the state of a checkpoint."""
        state = self.state
        if state.step and not state.costs:  # of a version that did not measure them
            state.unmeasured = [state.step, state.tokens]
        self.meter.phases.resume(state.costs, state.seconds, self.engine)
