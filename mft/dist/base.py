"""The contract between a distribution backend and the training loop, and the two backends without sharding.

A backend (`Single`, `Ddp`, ...) is a dataclass of plain values from conf/dist; its `start` returns the live `Engine`
of this rank, which wraps an `accelerate.Accelerator`.
"""

from __future__ import annotations
