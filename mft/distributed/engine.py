"""The contract between a distribution backend and the training loop.

A backend (`Single`, `Ddp`, ...) is a dataclass of plain values from conf/dist; its `start` returns the live
`Engine` of this rank, which wraps an `accelerate.Accelerator`. A backend that shards overrides the methods of
`Engine` that differ; the loop does not know which one it has.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from mft.distributed import heartbeat
from mft.distributed.engine_state import EngineState
from mft.distributed.ranks import T
from mft.distributed.sharded_state import read_state as read_state  # part of the contract, for floor 2
from mft.errors import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


class Backend(ABC):
    """What conf/dist chooses: a dataclass of plain values, whose `start` returns the live engine."""

    divides_on_load: ClassVar[bool] = False
    """Whether a rank never holds a whole weight, not even while the model is loaded."""
    casts_weights: ClassVar[bool] = False
    """Whether frozen weights too are cast, by value, to the run's precision where that is bf16 or fp16."""
    divides_into_dtensors: ClassVar[bool] = False
    """Whether the optimizer is given DTensors."""

    def casts_whole_numbers(self) -> bool:
        """Whether a backend that casts weights casts also those of whole numbers, such as packed ones."""
        return False

    def casts_weights_to(self, precision: str) -> str | None:
        """Returns the precision that frozen weights are cast to in a run of `precision`, None: they are not.

        Packed weights must lie in it, so that there is nothing to cast.
        """
        return precision if self.casts_weights else None

    def check_ranks(self, world: int) -> None:
        """Raises UserError for a number of ranks that this backend cannot have."""

    def meet(self) -> None:
        """Connects this rank with the others, before `start`, so that each knows which of them are alive."""

    def divided_parts(self) -> set[str]:
        """Returns what each rank holds a part of only: of "weights", "gradients" and "optimizer"."""
        return set()

    def bytes_per_trained_weight(self, half: bool) -> dict[str, int]:
        """Returns the bytes of a trained weight as "weights" and "gradients" hold it, and what "optimizer"
        keeps of it beside its states; half: whether the run computes in bf16 or fp16."""
        return {"weights": 4, "gradients": 4, "optimizer": 0}

    @abstractmethod
    def start(self, precision: str, cpu: bool | None = None) -> Engine:
        """Returns the engine of this rank, read from the environment (RANK, WORLD_SIZE, ...).

        precision: bf16, fp16 or fp32; cpu: None takes a GPU where there is one. Raises UserError when the
        device cannot do the precision, or when the process group is not the configured one.
        """


class Engine(EngineState):
    """One rank's live view of the distributed run: devices, gradients, sums over ranks, state.

    Used by the loop as: `prepare` once; for each micro-batch forward and `backward(share)` inside
    `accumulating(last)`; then `step`. Every rank makes the same calls in the same order.
    """

    kinds: tuple[str, ...] = ("NO",)
    """Names of accelerate's DistributedType that this backend may start as."""
    wrapper: str | None = None
    """Class name of the module that `prepare` returns; None: the module itself."""
    parameters = "whole"
    """What a rank holds of the model: parameters that are whole, DTensors (FSDP2) or partitioned (ZeRO-3)."""
    gather_on_save = True
    """Whether checkpoints hold the whole model besides the sharded state."""

    def __init__(self, accelerator: Accelerator, owns_group: bool):
        super().__init__(accelerator)
        self._owns_group = owns_group
        self.skipped = False
        """Whether the fp16 loss scaler skipped the last `step`: an overflow it has answered, no error."""
        # Any: the wrappers of DDP and DeepSpeed have their own methods
        self._module: Any = None
        # accelerate falls back to no distribution where it cannot start what it was configured for
        kind, world = accelerator.distributed_type.name, int(os.environ.get("WORLD_SIZE", 1))
        if kind not in self.kinds or self.world != world:
            expected = f"{' or '.join(self.kinds)} with {world} was expected"
            raise self._misconfigured(
                f"accelerate reports {kind} with {self.world} processes where {expected}"
            )

    def _misconfigured(self, what: str) -> UserError:
        return UserError(f"dist={self.name} did not start as configured: {what}")

    @property
    def sharded(self) -> bool:
        """Whether parameters are divided over the ranks: then all ranks must run every forward together."""
        return self.parameters != "whole"

    def loading(self, quantised: bool = False) -> AbstractContextManager[torch.device | None]:
        """Context for `from_pretrained`; it yields where every rank puts the weights, None where the context
        divides them. quantised: whether bitsandbytes packs them while they load."""
        # without sharding: what is whole on the device is not first whole in the machine's memory, per rank
        return nullcontext(self.device)

    def run_as_forward(self, call: Callable[[], T]) -> T:
        """Returns `call()`, which may call parts of the prepared module, such as generate; all ranks call it.

        It runs in the run's precision, and sharded parameters are gathered as they compute.
        """
        if not self.sharded:
            with self.accelerator.autocast():
                return call()
        self.model.forward = call  # the hooks that gather parameters belong to the call of the whole module
        try:
            result: T = self._module()
            return result
        finally:
            del self.model.forward

    def prepare(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Returns module and optimizer, on the device and wrapped; call the returned module, not its parts.

        Raises UserError when what came back is not what the backend stands for.
        """
        from torch.distributed.tensor import DTensor

        self.model = module
        self._module, self._optimizer = self._wrap(module, optimizer)
        wrapper, expected = type(self._module).__name__, self.wrapper or type(module).__name__
        if wrapper != expected:
            raise self._misconfigured(f"the model is a {wrapper}, not a {expected}")
        first = next(self._module.parameters())
        if isinstance(first.data, DTensor):
            parameters = "DTensors"
        else:
            parameters = "partitioned" if hasattr(first, "ds_id") else "whole"  # ds_id: ZeRO-3's number of it
        if parameters != self.parameters:
            raise self._misconfigured(f"its parameters are {parameters}, not {self.parameters}")
        return self._module, self._optimizer

    def _wrap(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        with warnings.catch_warnings():
            # the new name of broadcast_buffers does not exist in torch 2.6 to 2.12
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            module, optimizer = self.accelerator.prepare(module, optimizer)
        return module, optimizer

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Context around forward and backward of a micro-batch; only the last exchanges gradients."""
        return nullcontext() if last else self.accelerator.no_sync(self._module)

    def backward(self, share: torch.Tensor) -> None:
        """Adds the gradient of a micro-batch's share (a scalar), times `world`: DDP's mean becomes a sum."""
        self.accelerator.backward(share * self.world)

    def try_out(self, shares: Sequence[Callable[[], torch.Tensor]]) -> None:
        """Computes forward and backward of a step's micro-batches and drops their gradients; updates nothing.

        shares: each makes the forward of one. Where a rank holds the whole model, none waits for another
        here, so that one may run out of memory; `try_out([])` then drops what is there.
        """
        for number, share in enumerate(shares, start=1):
            with self.accumulating(last=self.divided and number == len(shares)):
                # never a step's: DeepSpeed clears what it has added up where that is not finite
                self.backward(share() * float("nan"))
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad()

    def step(self, max_norm: float | None = None) -> float:
        """Clips to `max_norm` (None: not), updates, zeroes the gradients; returns the norm before clipping.

        A non-finite norm means that nothing was updated: on fp16 with `skipped` True when the loss scaler
        answered an overflow (training continues), else it is an error for the loop to report. All ranks
        return the same norm, so that they decide alike.
        """
        import torch
        from torch.distributed.tensor import DTensor

        self.accelerator.unscale_gradients(self._optimizer)
        trained = [p for p in self._module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(_in_rows([p.grad for p in trained]))
        # gradients are equal on all ranks after the exchange; of sharded ones a rank has a part of the norm
        total = total.full_tensor() if isinstance(total, DTensor) else total
        norm = float(total)
        finite = norm - norm == 0.0
        if finite and max_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, max_norm, total)
        self.skipped = not finite and self._answers_overflow()
        if finite:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _answers_overflow(self) -> bool:
        """Lets the fp16 loss scaler lower its scale for the next step; returns whether it did.

        It did not where every gradient is finite and their norm alone is too large for float32, which a
        smaller scale would not help. The optimizer is not called: a fused one is called by the scaler also
        on an overflow, from which accelerate concludes that it has updated.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            return False
        before = scaler.get_scale()
        scaler.update()
        return bool(scaler.get_scale() < before)

    def close(self) -> None:
        """Ends the process group if made here, and frees memory; another engine may then start."""
        import torch
        from accelerate.state import AcceleratorState, GradientState

        heartbeat.stop()
        self._module = self._optimizer = None
        self.accelerator.free_memory()
        if self._owns_group and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # accelerate keeps its state in process-wide singletons and offers no public way to end them
        # private of accelerate (read in 1.15); tests/distributed/test_private_apis.py holds it
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _in_rows(gradients: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Returns the norms of the gradients' rows on a CPU, gradients on other devices as they are.

    torch's norm adds float32 up one after the other on a CPU: that of 8 million values comes out 2e-4 too
    low, of 67 million 5e-3; rows are short.
    """
    import torch

    found = [g for g in gradients if g is not None]
    return [torch.linalg.vector_norm(g, dim=-1) if g.device.type == "cpu" else g for g in found]
