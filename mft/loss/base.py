"""The contract between a loss mode and the training loop: shares that add up.

The loop computes per-token losses once; a mode turns them into this micro-batch's *share* of the step's
objective. The shares of all ranks and all micro-batches of an optimizer step add up to the objective, so the
objective does not depend on the number of ranks, on accumulation or on how samples are packed into rows.

Shapes, besides those of `mft.batch`: `x_m` one value for each of the B * T positions, flattened; `x_2K` the
two rows [sum of token losses, trained tokens] of each task.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mft.batch import IGNORE, Batch, StepCounts
from mft.errors import UserError

if TYPE_CHECKING:
    import torch


def task_sums(nll_BT: torch.Tensor, batch: Batch, tasks: int) -> torch.Tensor:
    """Returns float64 [2, K], on the device of `nll_BT`: sum of token losses and trained tokens per task."""
    import torch

    # What is not trained goes to an extra task, K, that is cut off: selecting positions by a mask would
    # make the host wait for the device to know how many there are.
    trained_BT = batch.target_BT != IGNORE
    task_m = torch.where(trained_BT, batch.task_BT, tasks).flatten()
    value_2m = torch.stack([nll_BT.detach().flatten().double(), torch.ones_like(task_m, dtype=torch.float64)])
    sums_2K = torch.zeros(2, tasks + 1, dtype=torch.float64, device=nll_BT.device)
    return sums_2K.scatter_add_(1, task_m.expand(2, -1), value_2m)[:, :tasks]


class TaskLoss(ABC):
    """Turns per-token losses into this micro-batch's share of the step's objective.

    Subclasses are dataclasses of plain values. Steps are numbered from 1: a probe before step s measures the
    model after s - 1 updates, and the weights learned from it hold from step s on. Order of calls:

    1. `setup` and `check_schedule`, once; `set_initial_losses` after a validation before the first step.
    2. In every optimizer step: `learn(valid_K=...)` if `wants_probe`; `statistics` for each micro-batch if
       `needs_statistics`; `share` for each micro-batch; after the update `learn(train_K=...)` if
       `wants_train`, then `learn(repeat_K=...)` if `wants_repeat`.
    3. `state_dict` for every checkpoint.
    """

    public_name: ClassVar[str] = ""
    """What it is called in names of metrics and in a run's identity."""
    names: Sequence[str] = ()
    """Of the K tasks, once `setup` was called."""
    weight_K: Any
    """float64 [K], weights of the tasks. Any: OmegaConf reads annotations where torch is not imported."""
    takes_weights: ClassVar[bool] = True
    """Whether `task.<name>.weight` means something to it."""
    needs_statistics: ClassVar[bool] = False
    """Whether the mode has `statistics`."""
    by_sample: ClassVar[bool] = False
    """Whether it counts samples, which then must not be split."""
    probe_samples: int = 0
    """Samples of each task that one probe reads, all ranks together; 0: the mode makes no probes."""

    def setup(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Receives the K task names and the static weights (`task.<name>.weight`), once, before training.

        Raises UserError for a weight that is negative or not finite; warns of weights that do nothing.
        """
        import torch

        for name, weight in zip(names, weights, strict=True):
            if not (weight >= 0 and math.isfinite(weight)):
                raise UserError(f"task.{name}.weight={weight} must be at least 0 and finite")
        if not self.takes_weights and len(set(weights)) > 1:
            mode = getattr(self, "public_name", "") or type(self).__name__
            pairs = zip(names, weights, strict=True)
            listed = ", ".join(f"task.{name}.weight={weight:g}" for name, weight in pairs)
            warnings.warn(f"loss={mode} has no task weights; these do nothing: {listed}", stacklevel=2)
        # equal weights, so that an adaptive mode without task weights starts from 1/K each
        weights = weights if self.takes_weights else [1.0] * len(names)
        self.names = tuple(names)
        self.weight_K = torch.tensor(list(weights), dtype=torch.float64)

    def check_schedule(self, steps: int, valid_samples: Sequence[int]) -> None:
        """Receives, after `setup`, the optimizer steps of the run and the validation samples of each task.

        Raises UserError where the mode cannot work with that; warns where its weights would never move.
        """

    @property
    def needs_validation(self) -> bool:
        """Whether the mode needs validation samples: a run without any is then refused early."""
        return False

    def set_initial_losses(self, valid_K: torch.Tensor) -> None:
        """Takes the losses of the validation before the first step, if there is one (train.eval_at_start)."""

    @abstractmethod
    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the scalar share of this micro-batch, differentiable in `nll_BT`.

        nll_BT: float32 (or float64) token losses, 0 where `batch.target_BT` is IGNORE
        counts: of the whole step, all ranks, on the CPU
        statistics: the summed result of `statistics`, on the CPU, None unless the mode has them
        A batch without a trained token gives 0. It reads no value of the device, for which the host would
        have to wait in every micro-batch.
        """

    def statistics(self, nll_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns a float64 [K, S] of sums that modes non-linear in a task's loss need of the whole step.

        Only with `needs_statistics`: the loop runs the micro-batches once without gradient (same dropout
        masks), sums over micro-batches and ranks, and hands the result to `share`.
        """
        raise NotImplementedError

    def wants_probe(self, step: int) -> bool:
        """Whether `learn` wants the per-task losses of a small validation before step `step`."""
        return False

    def wants_train(self, step: int) -> bool:
        """Whether `learn` wants the per-task training losses of step `step` (one small all-reduce)."""
        return False

    def wants_repeat(self, step: int) -> bool:
        """Whether the same micro-batches are to be forwarded again after step `step`'s update."""
        return False

    def learn(
        self,
        step: int,
        valid_K: torch.Tensor | None = None,
        train_K: torch.Tensor | None = None,
        repeat_K: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """Takes per-task token-mean losses and returns values to log.

        Losses are float64 [K]: NaN = task absent, inf = not finite. They come from sums over all ranks, so
        that every rank learns the same. Names of the values as in `train/weight/<task>`.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to continue bit-identically: tensors and plain values, those of a
        task under its name, since the tasks of a resumed run may come in another order."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
