"""The contract between a loss mode and the training loop: shares that add up.

The loop computes per-token losses once; a mode turns them into this micro-batch's *share* of the step's objective.
The shares of all ranks and all micro-batches of an optimizer step add up to the objective, so the objective does not
depend on the number of ranks, on accumulation or on how samples are packed into rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mft.batch import Batch, Counts


class TaskLoss:
    """Turns per-token losses into this micro-batch's share of the step's objective.

    Subclasses are dataclasses of plain values (their yaml lists every field). Order of calls:
    `start` once; then in every optimizer step `probe` data if `wants_probe` -> `learn(valid_K=...)`; `statistics` over all
    micro-batches if the mode has them; `share` for each micro-batch; after the update `learn(train_K=...)`, and
    `learn(repeat_K=...)` if `wants_repeat`. `state_dict` goes into checkpoints.
    """

    names: Sequence[str] = ()
    weight_K: torch.Tensor

    def start(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Receives the K task names and the user's static weights (`task.<name>.weight`). Called once, before training."""
        import torch

        self.names = tuple(names)
        self.weight_K = torch.tensor(list(weights), dtype=torch.float64)

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: Counts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the scalar share of this micro-batch, differentiable in `nll_BT`.

        nll_BT: float32 (or float64) token losses, 0 where `batch.target_BT` is IGNORE; counts: of the whole step, all ranks;
        statistics: the summed result of `statistics`, None unless the mode has them. A batch without a trained token gives 0.
        """
        raise NotImplementedError

    def statistics(self, nll_BT: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        """Returns a float64 [K, S] of sums that modes non-linear in a task's loss need of the whole step, or None.

        When it is not None the loop runs the micro-batches once without gradient (same dropout masks), sums over
        micro-batches and ranks, and hands the result to `share`.
        """
        return None

    def wants_probe(self, step: int) -> bool:
        """Whether a small validation is to be made before step `step` (its per-task losses arrive in `learn`)."""
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
        """Takes per-task token-mean losses (float64 [K], NaN = task absent) and returns values to log, e.g. `train/weight/<task>`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on bit-identically (tensors and plain values)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
