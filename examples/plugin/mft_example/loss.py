"""A loss mode: token losses above a limit count as the limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mft.batch import Batch, StepCounts
from mft.errors import UserError
from mft.loss.means import TaskTokenMean

if TYPE_CHECKING:
    import torch


@dataclass
class Clipped(TaskTokenMean):
    """task_token_mean of token losses that are at most `limit` nats, so that a few wrong tokens do not lead."""

    limit: float = 5.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise UserError(f"loss.limit={self.limit} must be above 0.")

    def share(
        self, nll_BT: torch.Tensor, batch: Batch, counts: StepCounts, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().share(nll_BT.clamp(max=self.limit), batch, counts, statistics)
