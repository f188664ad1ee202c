"""Metrics of a training run: per-task sums kept on the device, reduced over ranks only when they are read.

Shapes, besides those of `mft.batch`: `sums_2K` the rows [sum of token losses in nats, trained tokens] of each
task, `losses_2` [objective, router's loss], both summed over steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mft.hardware import send
from mft.loss.base import task_sums
from mft.training.memory import PEAKS
from mft.training.phases import Phase, Phases
from mft.training.speed import Peak, Work, rates

if TYPE_CHECKING:
    import torch

    from mft.batch import Batch, StepCounts
    from mft.distributed.engine import Engine

CLOCKED = ("speed/", "memory/", "total/seconds", "total/peak_memory_gib")
"""How the names of metrics begin that depend on the clock and the machine: equal runs differ in them."""

SAME = ("steps", "skipped", "processed", "positions", "trained", "grad_norm")
"""Attributes of a meter that are the same on every rank."""


def task_means(sums_2K: torch.Tensor) -> torch.Tensor:
    """Returns token means [K]: NaN where a task has no token, inf where not finite.

    So NaN always means absent, and a loss that overflowed stays visible and is never the best.
    """
    mean_K = sums_2K[0] / sums_2K[1]
    return mean_K.masked_fill((sums_2K[1] > 0) & ~mean_K.isfinite(), math.inf)


class Meter:
    """Sums what happened since the last `read`. Adding to it costs no device synchronisation.

    A step is collected by `add`, micro-batch by micro-batch, and counts once it is committed; one that was
    not applied is skipped.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device | str,
        flops_per_token: float = 0.0,
        peak_tflops: float | None = None,
        recomputed_per_token: float = 0.0,
        phases: Phases | None = None,
    ):
        """flops_per_token, recomputed_per_token: matrix work of a token in a step, and what gradient
        checkpointing adds to it; peak_tflops: of one device, None = that of a known GPU; phases: of the run,
        None = one that trains from now on."""
        import torch

        self.names = list(names)
        # float64: float32 sums over thousands of steps would lose the digits that are compared
        self.sums_2K = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        self.losses_2 = torch.zeros(2, dtype=torch.float64, device=device)
        self.step_sums_2K = torch.zeros_like(self.sums_2K)
        self.step_losses_2 = torch.zeros_like(self.losses_2)
        self.work = Work(flops_per_token, recomputed_per_token, Peak.of(device, peak_tflops))
        self.phases = phases or Phases(Phase.training, torch.device(device))
        self.restart()

    def restart(self) -> None:
        """Forgets what was summed; the time counts from now on."""
        self.sums_2K.zero_()
        self.losses_2.zero_()
        self.steps = self.skipped = self.processed = self.positions = self.trained = 0
        self.grad_norm = math.nan
        self.samples_K = [0.0] * len(self.names)
        self._training_before = self.phases.seconds(Phase.training)
        self._waited_before = self.phases.waited

    def resume(self, saved: Sequence[Mapping[str, Any]], engine: Engine) -> None:
        """Takes up what `state` returned before the checkpoint; the time counts from now on.

        On another number of ranks the first one takes the sums of all: what is read is a sum over ranks.
        """
        self.restart()
        if not saved:
            return
        all_ranks = saved if engine.is_main else []
        same_ranks = len(saved) == engine.world
        for part in [saved[engine.rank]] if same_ranks else all_ranks:
            self.sums_2K += self.sums_2K.new_tensor(part["sums"])
            self.losses_2 += self.losses_2.new_tensor(part["losses"])
        for name in SAME:  # an earlier version wrote others
            setattr(self, name, saved[0].get(name, 0))
        self.samples_K = list(saved[0]["samples"])
        self._training_before -= saved[0].get("seconds", 0.0)
        self._waited_before -= saved[engine.rank if same_ranks else 0].get("waited", 0.0)

    def state(self, engine: Engine) -> list[dict[str, Any]]:
        """Returns plain values of every rank from which `resume` continues, [] where nothing is summed.

        All ranks call it.
        """
        if not self.steps + self.skipped:
            return []
        own = {name: getattr(self, name) for name in SAME} | {"samples": self.samples_K}
        own |= {"seconds": self._seconds(), "waited": self.phases.waited - self._waited_before}
        return engine.gather(own | {"sums": self.sums_2K.tolist(), "losses": self.losses_2.tolist()})

    def _seconds(self) -> float:
        return self.phases.seconds(Phase.training) - self._training_before

    def add(self, batch: Batch, nll_BT: torch.Tensor, share: torch.Tensor, router: torch.Tensor) -> None:
        """Collects a micro-batch of the present step, on the device.

        nll_BT: token losses, detached; share, router: the micro-batch's part of the objective and the
        router's loss.
        """
        # nothing here reads a value of the device, so that it never waits
        self.step_sums_2K += task_sums(nll_BT, batch, len(self.names))
        self.step_losses_2[0] += share.detach()
        self.step_losses_2[1] += router.detach()

    def commit(self, counts: StepCounts, grad_norm: float) -> None:
        """Counts a step that was applied. counts: of all ranks."""
        self.steps += 1
        self.grad_norm = grad_norm
        self.samples_K = [a + b for a, b in zip(self.samples_K, counts.samples_K.tolist(), strict=True)]
        self.losses_2 += self.step_losses_2
        self.sums_2K += self.step_sums_2K
        self._count(counts)

    def begin_step(self) -> None:
        """Forgets what was collected of the step before."""
        self.step_sums_2K.zero_()
        self.step_losses_2.zero_()

    def skip(self, counts: StepCounts) -> None:
        """Counts the present step, which was not applied: its time and tokens, not its losses."""
        self.skipped += 1
        self._count(counts)

    def _count(self, counts: StepCounts) -> None:
        self.processed += int(counts.processed)
        self.positions += int(counts.positions)
        self.trained += int(counts.trained)

    def read(self, engine: Engine) -> dict[str, float]:
        """Returns the metrics since the last read, summed over ranks, and starts again. All ranks call it."""
        import torch

        steps = self.steps + self.skipped
        if not steps:
            return {}
        seconds = self._seconds()
        own = [self.phases.waited - self._waited_before, *self.phases.memory.read(Phase.training)]
        # a place for each rank, so that a sum over ranks keeps the values of all
        local_RM = torch.zeros(engine.world, len(own), dtype=torch.float64)
        local_RM[engine.rank] = torch.tensor(own, dtype=torch.float64)
        # one all-reduce for everything, which the host waits for once
        local = send(local_RM.flatten(), self.sums_2K.device)
        summed = engine.sum(torch.cat([self.sums_2K.flatten(), self.losses_2, local]))
        sums, losses, of_ranks = summed.split([self.sums_2K.numel(), 2, local_RM.numel()])
        sums_2K, (objective, router) = sums.reshape(2, -1), losses.tolist()
        waited, *peaks = of_ranks.reshape(engine.world, -1).amax(0).tolist()
        values = {"train/loss": math.nan, "grad_norm": self.grad_norm}
        if self.steps:
            values["train/loss"] = objective / self.steps
        if router:
            values["train/router"] = router / self.steps
        if self.skipped:
            values["train/skipped_steps"] = float(self.skipped)
        mean_K, trained_K = task_means(sums_2K).tolist(), sums_2K[1].tolist()
        for name, mean, trained, samples in zip(self.names, mean_K, trained_K, self.samples_K, strict=True):
            if trained:
                values[f"train/loss/{name}"] = mean
            values[f"train/tokens/{name}"] = trained
            values[f"train/samples/{name}"] = samples
        speeds = rates(self.processed, self.positions, self.trained, seconds)
        speeds |= self.work.utilization(self.processed, engine.world * seconds)
        values |= {f"speed/{name}": value for name, value in speeds.items()}
        values["speed/seconds_per_step"] = seconds / steps
        values["speed/data_wait_share"] = waited / seconds
        values["data/fill"] = self.processed / max(1, self.positions)
        values |= {f"memory/{name}": peak / 2**30 for name, peak in zip(PEAKS, peaks, strict=False)}
        self.restart()
        return values
