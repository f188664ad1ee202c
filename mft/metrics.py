"""Numbers of a training run: per-task sums kept on the device and reduced over ranks only when they are read."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mft.batch import Batch, Counts

PEAK_BF16_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165, "V100": 125}
"""Dense tensor-core peak of known GPUs (vendors' data sheets), by a part of the device's name."""


def task_means(sums_2K: torch.Tensor) -> torch.Tensor:
    """Returns token means [K] of ([nll sums, token counts]); NaN where a task has no token."""
    return sums_2K[0] / sums_2K[1]


class Meter:
    """Sums what happened since the last `read`. Adding costs no device synchronisation."""

    def __init__(
        self, names: Sequence[str], device: Any, flops_per_token: float = 0.0, peak_tflops: float | None = None
    ):
        import torch

        self.names = list(names)
        self.sums_2K = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        self.objective = torch.zeros((), dtype=torch.float64, device=device)
        self.flops_per_token = flops_per_token
        self.peak_flops = (peak_tflops or known_peak(device) or 0.0) * 1e12
        self._restart()

    def _restart(self) -> None:
        self.sums_2K.zero_()
        self.objective.zero_()
        self.steps, self.tokens, self.padding = 0, 0, 0
        self.grad_norm = 0.0
        self.samples_K = [0.0] * len(self.names)
        self.started = time.perf_counter()

    def micro_batch(self, share: torch.Tensor, sums_2K: torch.Tensor, batch: Batch) -> None:
        """Adds one micro-batch of this rank: its share, its per-task sums, the tokens it holds."""
        self.objective += share.detach()
        self.sums_2K += sums_2K
        filled = int((batch.sample_BT >= 0).sum())
        self.tokens += filled
        self.padding += batch.sample_BT.numel() - filled

    def step(self, grad_norm: float, counts: Counts) -> None:
        """Adds one optimizer step."""
        self.steps += 1
        self.grad_norm = grad_norm
        self.samples_K = [a + b for a, b in zip(self.samples_K, counts.samples_K.tolist(), strict=True)]

    def read(self, engine: Any) -> dict[str, float]:
        """Returns the metrics since the last read, summed over ranks, and starts again. All ranks must call it."""
        import torch

        if not self.steps:
            return {}
        seconds = time.perf_counter() - self.started
        local = torch.tensor([self.tokens, self.padding], dtype=torch.float64, device=self.sums_2K.device)
        summed = engine.sum(torch.cat([self.sums_2K.flatten(), self.objective.reshape(1), local])).cpu()
        tasks = len(self.names)
        sums_2K, (objective, tokens, padding) = summed[: 2 * tasks].reshape(2, tasks), summed[2 * tasks :].tolist()
        values = {"train/loss": objective / self.steps, "grad_norm": self.grad_norm}
        means_K = task_means(sums_2K).tolist()
        for name, mean, trained, samples in zip(self.names, means_K, sums_2K[1].tolist(), self.samples_K, strict=True):
            if trained:
                values[f"train/loss/{name}"] = mean
            values[f"train/tokens/{name}"] = trained
            values[f"train/samples/{name}"] = samples
        values["speed/tokens_per_second"] = tokens / seconds
        values["speed/seconds_per_step"] = seconds / self.steps
        values["data/fill"] = tokens / max(1.0, tokens + padding)
        if self.peak_flops and self.flops_per_token:
            values["speed/mfu"] = tokens / seconds * self.flops_per_token / (self.peak_flops * engine.world)
        values["memory/peak_gib"] = peak_memory_gib(self.sums_2K.device)
        self._restart()
        return values


def known_peak(device: Any) -> float | None:
    """Returns the bf16 peak of this rank's GPU in TFLOP/s, or None for a CPU or an unknown GPU."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_BF16_TFLOPS.items() if part in name), None)


def flops_per_token(model: torch.nn.Module) -> float:
    """Returns the matrix work of one token in one training step: 2 N forward, 2 N back through the activations, and 2 more
    for every trained weight. N leaves out the embedding table, attention's quadratic part and recomputation."""
    embeddings = {
        id(p) for m in model.modules() if type(m).__name__ == "Embedding" for p in m.parameters(recurse=False)
    }
    tied = {id(p) for m in model.modules() if hasattr(m, "out_features") for p in m.parameters(recurse=False)}
    total = 0.0
    for parameter in model.parameters():
        if parameter.dim() < 2 or (id(parameter) in embeddings and id(parameter) not in tied):
            continue
        total += (6.0 if parameter.requires_grad else 4.0) * parameter.numel()
    return total


def peak_memory_gib(device: Any) -> float:
    """Returns the peak memory of this process: allocated on its GPU, or resident on a CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def mean_of_tasks(losses: dict[str, float]) -> float:
    """Returns the plain mean over the tasks that have a loss; NaN when none has."""
    values = [v for v in losses.values() if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan
