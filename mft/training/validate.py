"""Per-task validation loss: token-weighted over all ranks, over a fixed selection of samples.

Shapes: `x_K` one value for each task, `sums_2K` the rows [sum of token losses, trained tokens].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from mft.loss.base import task_sums
from mft.training.metrics import task_means

if TYPE_CHECKING:
    import torch

    from mft.batch import Batch
    from mft.distributed.engine import Engine
    from mft.training.sample_losses import SampleSums


def forward(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (nll_BT, router loss) of a prepared `TokenLoss` on one micro-batch."""
    nll_BT, router = module(batch)
    return nll_BT, router


class Evaluator:
    """Validates, or tests, on the same micro-batches every time.

    batches: makes this rank's micro-batches (all ranks have equally many; fillers hold only empty rows).
    """

    def __init__(self, engine: Engine, names: Sequence[str], batches: Callable[[], Iterable[Batch]]):
        self.engine, self.names, self.batches = engine, list(names), batches

    def losses(self, module: torch.nn.Module, samples: SampleSums | None = None) -> torch.Tensor:
        """Returns token means, float64 [K] on the CPU: NaN for a task without tokens, inf where not finite.

        All ranks must call it. samples: collects the losses of single samples. The module comes back in the
        mode it was in; no random number is drawn.
        """
        import torch

        training = module.training
        module.eval()
        # float64 sums stay on the device; one all-reduce at the end makes the mean exact over all ranks
        sums_2K = torch.zeros(2, len(self.names), dtype=torch.float64, device=self.engine.device)
        with torch.no_grad():
            for batch in self.batches():
                batch = batch.to(self.engine.device)
                nll_BT, _ = forward(module, batch)
                sums_2K += task_sums(nll_BT, batch, len(self.names))
                if samples is not None:
                    samples.add(nll_BT, batch)
        module.train(training)
        return task_means(self.engine.sum(sums_2K))

    def by_name(self, module: torch.nn.Module, samples: SampleSums | None = None) -> dict[str, float]:
        """Returns the losses of the tasks that have samples here, by task name; samples: see `losses`."""
        means = zip(self.names, self.losses(module, samples).tolist(), strict=True)
        return {name: mean for name, mean in means if not math.isnan(mean)}
