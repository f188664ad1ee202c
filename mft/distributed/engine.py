"""The contract between a distribution backend and the training loop.

A backend (`Single`, `Ddp`, ...) is a dataclass of plain values from conf/dist; its `start` returns the live
`Engine` of this rank, which wraps an `accelerate.Accelerator`. A backend that shards overrides the methods of
`Engine` that differ; the loop does not know which one it has.
"""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mft.distributed import heartbeat, rng, sharded_state
from mft.distributed.sharded_state import read_state as read_state  # part of the contract, for floor 2
from mft.errors import UserError
from mft.hardware import send

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

T = TypeVar("T")


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


class Engine:
    """One rank's live view of the distributed run: devices, gradients, sums over ranks, state.

    Used by the loop as: `prepare` once; for each micro-batch forward and `backward(share)` inside
    `accumulating(last)`; then `step`. Every rank makes the same calls in the same order.
    """

    name = "single"
    kinds: tuple[str, ...] = ("NO",)
    """Names of accelerate's DistributedType that this backend may start as."""
    wrapper: str | None = None
    """Class name of the module that `prepare` returns; None: the module itself."""
    parameters = "whole"
    """What a rank holds of the model: parameters that are whole, DTensors (FSDP2) or partitioned (ZeRO-3)."""
    divided = False
    """Whether each rank keeps its part of the optimizer's state, and writes a file of the resume state."""
    gather_on_save = True
    """Whether checkpoints hold the whole model besides the sharded state."""

    def __init__(self, accelerator: Accelerator, owns_group: bool):
        import torch

        self.accelerator = accelerator
        self._owns_group = owns_group
        # accelerate numbers CPUs by rank ("cpu:1"), which compares unequal to where tensors really are
        on_cpu = accelerator.device.type == "cpu"
        self.device: torch.device = torch.device("cpu") if on_cpu else accelerator.device
        self.rank: int = accelerator.process_index
        self.local_rank: int = max(accelerator.local_process_index, 0)
        self.world: int = accelerator.num_processes
        self.skipped = False
        """Whether the fp16 loss scaler skipped the last `step`: an overflow it has answered, no error."""
        self.model: torch.nn.Module
        """The module given to `prepare`."""
        # Any: the wrappers of DDP and DeepSpeed have their own methods
        self._module: Any = None
        self._optimizer: Any = None
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
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and the terminal."""
        return self.rank == 0

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
        total = torch.nn.utils.get_total_norm([p.grad for p in trained])
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

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all ranks, a new tensor of the same type on the CPU.

        The host waits for the device, once; with one rank and a tensor on the CPU it does not.
        """
        import torch

        if self.world == 1:
            return tensor.detach().to("cpu", copy=True)
        total = send(tensor.detach().clone(), self.device)
        torch.distributed.all_reduce(total)
        return total.cpu()

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, by rank (pickled: only between our own ranks)."""
        import torch

        values = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here, however long one of them works alone: in no collective.

        Raises `stalled.Stalled` when a rank gives no sign of life any more.
        """
        heartbeat.wait_for_all()

    def patient(self) -> AbstractContextManager[None]:
        """Context for work that takes ranks very different times: collectives wait as long as `barrier`.

        All ranks enter it; it ends with a `barrier`.
        """
        return heartbeat.patient()

    def full_state(self, trainable: bool = False) -> dict[str, torch.Tensor]:
        """Returns whole tensors by name, for saving; complete on rank 0, a backend may return {} on others.

        All ranks call it. trainable: only parameters that are trained (an adapter), else the whole state
        dict.
        """
        tensors = self._saved_tensors(trainable)
        # one tensor after the other, so that rank 0 has memory for one at a time; a tied weight stays tied
        copies: dict[int, torch.Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) not in copies:
                copies[id(tensor)] = self._whole(tensor)
        if self.divided and not self.is_main:
            return {}
        return {name: copies[id(tensor)] for name, tensor in tensors.items()}

    def full_size(self, trainable: bool = False) -> int:
        """Returns the bytes of the tensors of `full_state`, which is not made for it."""
        tensors = {id(tensor): tensor for tensor in self._saved_tensors(trainable).values()}
        # what is trained is saved in fp32, also where a backend computes with a copy in half precision
        return sum(self._numel(t) * (4 if t.requires_grad else t.element_size()) for t in tensors.values())

    def _saved_tensors(self, trainable: bool) -> dict[str, torch.Tensor]:
        if trainable:
            return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return self.model.state_dict(keep_vars=True)

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a whole parameter or buffer, for saving; all ranks call it, for rank 0."""
        return tensor.detach()

    def _numel(self, tensor: torch.Tensor) -> int:
        """Returns the elements of a whole parameter or buffer."""
        return tensor.numel()

    def save_state(self, folder: Path) -> None:
        """Writes what an exact resume needs: trained parameters, optimizer, loss scaler, random states.

        All ranks call it, after `prepare`. Layout: engine.json, shard-<rank> and optimizer-<rank>.safetensors
        by each rank that keeps a part of the optimizer (see `sharded_state`), rng-<rank>.pt by each rank.
        Parameters that are not trained are not written: they come from the base model. Not atomic: the caller
        writes into a temporary folder and renames it after all ranks have returned.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.divided or self.is_main:
            sharded_state.save(self._shards(), self._optimizer.optimizer, folder, self.rank)
        if self.is_main:
            shards = self.world if self.divided else 1
            values = {"dist": self.name, "world": self.world, "shards": shards, "optimizers": shards}
            values["scaler"] = self._scaler_state()
            (folder / "engine.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        rng.save(folder / f"rng-{self.rank}.pt")
        self.barrier()

    def state_size(self) -> int:
        """Returns the bytes of the tensors that this rank would write in `save_state`."""
        if not (self.divided or self.is_main):
            return 0
        return sharded_state.size(self._shards(), self._optimizer.optimizer)

    def load_weights(self, folder: Path) -> None:
        """Restores the trained parameters alone of what `save_state` wrote; all ranks call it.

        The files of the optimizer and of the random states may be gone. Raises UserError when the state is of
        another model.
        """
        with self.patient():
            sharded_state.load(self._shards(), None, folder, self._trained())
            self._sync_computed_weights()

    def load_state(self, folder: Path) -> bool:
        """Restores what `save_state` wrote, of this or another backend, on any number of ranks; all call it.

        Call it last before training continues: anything random in between would be drawn from the restored
        states. Returns whether the layout is the same, so that the run continues bit-identically; with
        another one the losses are equal to rounding, and ranks without a saved random state keep the one they
        have. Raises UserError when the state is not complete, is of another model, or does not fit another
        layout.
        """
        with self.patient():
            saved = read_state(folder)
            sharded_state.load(self._shards(), self._optimizer.optimizer, folder, self._trained())
            self._sync_computed_weights()
            if saved["scaler"]:
                self._load_scaler(saved["scaler"])
            random = folder / f"rng-{self.rank}.pt"
            if random.exists():
                rng.load(random)
        return bool(saved["dist"] == self.name and saved["world"] == self.world)

    def _trained(self) -> set[str]:
        """Returns the names of all trained parameters."""
        return {name for name, p in self.model.named_parameters() if p.requires_grad}

    def _shards(self) -> list[sharded_state.Shard]:
        """Returns what this rank updates: here whole parameters."""
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return [sharded_state.Shard(name, 0, p.detach().view(-1), p, 0) for name, p in trained]

    def _sync_computed_weights(self) -> None:
        """Copies the loaded weights into those that are computed with, where these are others."""

    def _scaler_state(self) -> dict[str, Any]:
        """Returns the state of the fp16 loss scaler as plain values, {} without one."""
        scaler = self.accelerator.scaler
        return scaler.state_dict() if scaler else {}

    def _load_scaler(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

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
