"""What all backends with a process group have in common: how it starts, and how long its collectives wait."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from mft.distributed import heartbeat, torch_private
from mft.distributed.accelerator import accelerator
from mft.distributed.engine import Backend
from mft.errors import ranged
from mft.hardware import visible_gpus

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import KwargsHandler


@dataclass
class GroupBackend(Backend):
    """A backend whose ranks make a process group, also where there is one rank only."""

    timeout_minutes: float = ranged(120.0, above=0, max=10_080)
    """How long a collective in a step waits for a rank, and how long a rank may give no sign of life."""

    def meet(self) -> None:
        heartbeat.start(self.timeout_minutes)

    def grouped(
        self, precision: str, cpu: bool | None, *handlers: KwargsHandler, backend: str | None = None
    ) -> tuple[Accelerator, bool]:
        """Returns the Accelerator of this rank inside a process group, and whether the group was made here.

        Ranks are read from the environment (RANK, WORLD_SIZE, ...); without them this is a group of one.
        backend: torch's name of it, None for accelerate's choice.
        """
        import torch
        from accelerate.utils import InitProcessGroupKwargs, patch_environment

        self.meet()
        heartbeat.wait_for_all()  # the ranks of another machine may still tokenise
        alone: dict[str, str | int] = {}
        if "WORLD_SIZE" not in os.environ:
            alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}  # 0: any free port
        # tests and notebooks have one already, which outlives the engine
        owns_group = not torch.distributed.is_initialized()
        timeout = timedelta(minutes=self.timeout_minutes)
        group = InitProcessGroupKwargs(timeout=timeout, **({"backend": backend} if backend else {}))
        with patch_environment(**alone):
            started = accelerator(precision, cpu, group, *handlers)
        torch_private.set_timeout(timeout)
        return started, owns_group


def number_own_device() -> None:
    """Sets LOCAL_RANK, by which DDP, barriers and DeepSpeed number their GPU, to 0 where a rank sees one GPU.

    So it is under srun --gpus-per-task=1. FSDP2 needs no number, and its loading asks by LOCAL_RANK which
    rank is the first of its machine.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1 and visible_gpus() == 1:
        os.environ["LOCAL_RANK"] = "0"
