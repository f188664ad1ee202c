"""A loss that asks for more memory than any machine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mft.loss.means import TaskTokenMean


@dataclass
class Exhausting(TaskTokenMean):
    """Fails in the first step."""

    def share(self, *arguments: Any) -> Any:
        """Allocates an exbibyte."""
        import torch

        return torch.empty(2**60)
