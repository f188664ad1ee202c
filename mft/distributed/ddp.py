"""The two backends that shard nothing: every rank holds the full model, its gradients and its optimizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from mft.distributed.accelerator import RANK_VARIABLES, accelerator
from mft.distributed.engine import Backend, Engine
from mft.distributed.process_group import GroupBackend, number_own_device
from mft.errors import UserError


class DdpEngine(Engine):
    """Every rank holds the full model; gradients are reduced in the last micro-batch of a step."""

    name = "ddp"
    kinds = ("MULTI_CPU", "MULTI_GPU")
    wrapper = "DistributedDataParallel"


@dataclass
class Single(Backend):
    """One process on one device, without a process group."""

    public_name: ClassVar[str] = "single"

    def check_ranks(self, world: int) -> None:
        """Raises UserError for more than one rank."""
        if world > 1:
            raise UserError(f"dist=single with {world} ranks: choose dist=ddp, or launch.nproc=1")

    def start(self, precision: str, cpu: bool | None = None) -> Engine:
        self.check_ranks(int(os.environ.get("WORLD_SIZE", 1)))
        # with a launcher's variables accelerate would make a process group of one
        removed = {name: os.environ.pop(name) for name in RANK_VARIABLES if name in os.environ}
        try:
            return Engine(accelerator(precision, cpu), owns_group=False)
        finally:
            os.environ.update(removed)


@dataclass
class Ddp(GroupBackend):
    """torch's DistributedDataParallel. One rank is a process group of one, with the same code path."""

    public_name: ClassVar[str] = "ddp"

    find_unused_parameters: bool = False
    """Look for parameters that took no part in a step, at the cost of a walk over the graph."""

    def start(self, precision: str, cpu: bool | None = None) -> DdpEngine:
        from accelerate import DistributedDataParallelKwargs

        if not cpu:
            number_own_device()
        # The buffers of a language model are constants: no need to broadcast them before every forward.
        # Gradients that are views of the exchange buffers save one copy of all gradients.
        options = DistributedDataParallelKwargs(
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=self.find_unused_parameters,
        )
        return DdpEngine(*self.grouped(precision, cpu, options))
