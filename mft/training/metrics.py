"""Metrics of a training run: per-task sums kept on the device, reduced over ranks only when they are read.

Shapes, besides those of `mft.batch`: `sums_2K` the rows [sum of token losses in nats, trained tokens] of each
task, `losses_2` [objective, router's loss], both summed over steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mft.hardware import send
from mft.loss.base import task_sums
from mft.training.memory import PeakMemory

if TYPE_CHECKING:
    import torch

    from mft.batch import Batch, StepCounts
    from mft.distributed.engine import Engine

CLOCKED = ("speed/", "memory/", "total/seconds")
"""How the names of metrics begin that depend on the clock and the machine: equal runs differ in them."""

PEAK_BF16_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "4090": 165,
    "V100": 125,
}
"""Dense tensor-core peak of known GPUs (vendors' data sheets), by a part of the device's name."""


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
    ):
        """flops_per_token, recomputed_per_token: matrix work of a token in a step, and what gradient
        checkpointing adds to it; peak_tflops: of one device, None = that of a known GPU."""
        import torch

        self.names = list(names)
        # float64: float32 sums over thousands of steps would lose the digits that are compared
        self.sums_2K = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        self.losses_2 = torch.zeros(2, dtype=torch.float64, device=device)
        self.step_sums_2K = torch.zeros_like(self.sums_2K)
        self.step_losses_2 = torch.zeros_like(self.losses_2)
        self.flops_per_token, self.recomputed_per_token = flops_per_token, recomputed_per_token
        self.peak_flops = (peak_tflops or known_peak(device) or 0.0) * 1e12
        self.memory = PeakMemory.of(device)
        self.restart()

    def restart(self) -> None:
        """Forgets what was summed; the time counts from now on."""
        self.sums_2K.zero_()
        self.losses_2.zero_()
        self.steps, self.skipped, self.tokens, self.padding = 0, 0, 0, 0
        self.grad_norm = math.nan
        self.samples_K = [0.0] * len(self.names)
        self.started = time.perf_counter()

    def resume(self, saved: Sequence[Mapping[str, Any]], engine: Engine) -> None:
        """Takes up what `state` returned before the checkpoint; the time counts from now on.

        On another number of ranks the first one takes the sums of all: what is read is a sum over ranks.
        """
        self.restart()
        self.memory.close(training=False)  # loading and the first validation
        if not saved:
            return
        all_ranks = saved if engine.is_main else []
        for part in [saved[engine.rank]] if len(saved) == engine.world else all_ranks:
            self.sums_2K += self.sums_2K.new_tensor(part["sums"])
            self.losses_2 += self.losses_2.new_tensor(part["losses"])
            self.tokens, self.padding = self.tokens + part["tokens"], self.padding + part["padding"]
        # the same on every rank
        for name in ("steps", "skipped", "grad_norm"):
            setattr(self, name, saved[0][name])
        self.samples_K = list(saved[0]["samples"])

    def state(self, engine: Engine) -> list[dict[str, Any]]:
        """Returns plain values of every rank from which `resume` continues, [] where nothing is summed.

        All ranks call it. The time is left out: speeds are those of the process that logs them.
        """
        if not self.steps + self.skipped:
            return []
        names = ("steps", "skipped", "tokens", "padding", "grad_norm")
        own = {name: getattr(self, name) for name in names} | {"samples": self.samples_K}
        return engine.gather(own | {"sums": self.sums_2K.tolist(), "losses": self.losses_2.tolist()})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time and memory do not count: validating and saving are no part of a step."""
        began = time.perf_counter()
        self.memory.close(training=True)
        yield
        self.memory.close(training=False)
        self.started += time.perf_counter() - began

    def add(self, batch: Batch, nll_BT: torch.Tensor, share: torch.Tensor, router: torch.Tensor) -> None:
        """Collects a micro-batch of the present step, on the device.

        nll_BT: token losses, detached; share, router: the micro-batch's part of the objective and the
        router's loss.
        """
        # nothing here reads a value of the device, so that it never waits
        self.step_sums_2K += task_sums(nll_BT, batch, len(self.names))
        self.step_losses_2[0] += share.detach()
        self.step_losses_2[1] += router.detach()

    def commit(self, counts: StepCounts, grad_norm: float, batches: Sequence[Batch]) -> None:
        """Counts a step that was applied. counts: of all ranks; batches: of this one."""
        self.steps += 1
        self.grad_norm = grad_norm
        self.samples_K = [a + b for a, b in zip(self.samples_K, counts.samples_K.tolist(), strict=True)]
        self.losses_2 += self.step_losses_2
        self.sums_2K += self.step_sums_2K
        self._count(batches)

    def begin_step(self) -> None:
        """Forgets what was collected of the step before."""
        self.step_sums_2K.zero_()
        self.step_losses_2.zero_()

    def skip(self, batches: Sequence[Batch]) -> None:
        """Counts the present step, which was not applied: its time and tokens, not its losses."""
        self.skipped += 1
        self._count(batches)

    def _count(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self.tokens += batch.layout.tokens
            self.padding += batch.sample_BT.numel() - batch.layout.tokens

    def read(self, engine: Engine) -> dict[str, float]:
        """Returns the metrics since the last read, summed over ranks, and starts again. All ranks call it."""
        import torch

        steps = self.steps + self.skipped
        if not steps:
            return {}
        seconds = time.perf_counter() - self.started
        local = send(torch.tensor([self.tokens, self.padding], dtype=torch.float64), self.sums_2K.device)
        # one all-reduce for everything, which the host waits for once
        summed = engine.sum(torch.cat([self.sums_2K.flatten(), self.losses_2, local]))
        sums_2K = summed[:-4].reshape(2, -1)
        objective, router, tokens, padding = summed[-4:].tolist()
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
        values["speed/tokens_per_second"] = tokens / seconds
        values["speed/seconds_per_step"] = seconds / steps
        values["data/fill"] = tokens / max(1.0, tokens + padding)
        if self.peak_flops and self.flops_per_token:
            tokens_per_peak = tokens / seconds / (self.peak_flops * engine.world)
            values["speed/mfu"] = tokens_per_peak * self.flops_per_token
            if self.recomputed_per_token:
                values["speed/hfu"] = tokens_per_peak * (self.flops_per_token + self.recomputed_per_token)
        values |= self.memory.read_steps()
        self.restart()
        return values


def known_peak(device: torch.device | str) -> float | None:
    """Returns the bf16 peak of this rank's GPU in TFLOP/s, or None for a CPU or an unknown GPU."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_BF16_TFLOPS.items() if part in name), None)
