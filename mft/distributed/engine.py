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
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from mft.distributed import rng, sharded_state
from mft.errors import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

T = TypeVar("T")


class Backend(ABC):
    """What conf/dist chooses: subclasses are dataclasses of plain values, whose `start` returns the live
    engine."""

    divides_on_load: ClassVar[bool] = False
    """Whether a rank never holds a whole weight, not even while the model is loaded."""

    def check_ranks(self, world: int) -> None:
        """Raises UserError for a number of ranks that this backend cannot have."""

    @abstractmethod
    def start(self, precision: str, cpu: bool | None = None) -> Engine:
        """Returns the engine of this rank. precision: bf16, fp16 or fp32; cpu: None takes a GPU where there
        is one.

        Ranks are read from the environment (RANK, WORLD_SIZE, ...). Raises UserError when the device cannot
        do the precision, or when the group of ranks is not what was asked for.
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
    sharded = False
    """Whether parameters are divided over the ranks: then all ranks must run every forward together."""
    divided = False
    """Whether each rank keeps its own part of the optimizer's state, and so writes a file of the resume
    state."""
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
        """Whether the last `step` was skipped by the fp16 loss scaler (an overflow it has answered; not an
        error)."""
        self._module: torch.nn.Module | None = None
        self._optimizer: Any = None
        kind, world = accelerator.distributed_type.name, int(os.environ.get("WORLD_SIZE", 1))
        if kind not in self.kinds or self.world != world:
            raise UserError(
                f"dist={self.name} did not start as configured: accelerate reports {kind} with "
                f"{self.world} processes where {' or '.join(self.kinds)} with {world} was expected"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and talks to the person."""
        return self.rank == 0

    def loading(self) -> AbstractContextManager[None]:
        """Context for `from_pretrained`; without sharding every rank simply loads."""
        return nullcontext()

    def run_as_forward(self, call: Callable[[], T]) -> T:
        """Returns `call()`, in which parts of the prepared module may be called as they are in its own
        forward: in the run's precision, and with what is divided over the ranks gathered as it computes. All
        ranks make it alike.
        """
        with self.accelerator.autocast():
            return call()

    def _in_place_of_forward(self, call: Callable[[], T]) -> T:
        assert self._module is not None, "prepare first"
        inner = self.unwrap(self._module)
        inner.forward = call  # the hooks that gather parameters belong to the call of the module
        try:
            return cast("T", self._module())
        finally:
            del inner.forward

    def prepare(self, module: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Returns module and optimizer, placed on the device and wrapped; call the returned module, not its
        parts.

        Raises UserError when what came back is not what the backend stands for.
        """
        self._require_trained(module)
        with (
            warnings.catch_warnings()
        ):  # the new name of broadcast_buffers does not exist in torch 2.6 to 2.12
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            self._module, self._optimizer = self.accelerator.prepare(module, optimizer)
        self._require_wrapper(type(module).__name__)
        self._verify_sharding(next(self._module.parameters()))
        return self._module, self._optimizer

    def _require_trained(self, module: torch.nn.Module) -> None:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise UserError("nothing to train: no parameter of the model requires a gradient")

    def _require_wrapper(self, unwrapped: str = "") -> None:
        found, expected = type(self._module).__name__, self.wrapper or unwrapped
        if found != expected:
            raise UserError(
                f"dist={self.name} did not start as configured: the model is a {found}, not a {expected}"
            )

    def _verify_sharding(self, first: torch.nn.Parameter) -> None:
        """Raises UserError unless the first parameter is whole: no DTensor (FSDP2), not partitioned by
        ZeRO-3."""
        import torch
        from torch.distributed.tensor import DTensor

        data = getattr(first, "data", first)
        if not isinstance(first, torch.nn.Parameter) or isinstance(data, DTensor) or hasattr(first, "ds_id"):
            raise UserError(
                f"dist={self.name} keeps parameters whole, but the first one is a {type(first).__name__}"
            )

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Context around forward and backward of one micro-batch; ranks exchange gradients only in the last
        one."""
        assert self._module is not None, "prepare first"
        return nullcontext() if last else self.accelerator.no_sync(self._module)

    def backward(self, share: torch.Tensor) -> None:
        """Adds the gradient of this micro-batch's share (a scalar). Multiplies by `world`: DDP's mean becomes
        a sum."""
        self.accelerator.backward(share * self.world)

    def step(self, max_norm: float | None = None) -> float:
        """Clips to `max_norm` (None or 0: not), updates, zeroes the gradients; returns the norm before
        clipping.

        A non-finite norm means that nothing was updated: on fp16 with `skipped` True when the loss scaler
        answered an overflow (training continues), else it is an error for the loop to report. The gradients
        are equal on all ranks after the exchange, so all ranks see the same norm and decide alike; sharding
        backends must agree explicitly.
        """
        import torch

        assert self._module is not None, "prepare first"
        self.accelerator.unscale_gradients(self._optimizer)
        trained = [p for p in self._module.parameters() if p.grad is not None]
        total = self._norm([p.grad for p in trained if p.grad is not None])
        norm = float(total)
        finite = norm - norm == 0.0
        if finite and max_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, max_norm, total)
        self.skipped = False
        if (
            finite or self.accelerator.scaler is not None
        ):  # the scaler sees the overflow too, skips, lowers its scale
            self._optimizer.step()
            self.skipped = bool(self._optimizer.step_was_skipped)
        self._optimizer.zero_grad()
        return norm

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Returns the norm of all gradients as one vector, the same number on every rank."""
        import torch

        return torch.nn.utils.get_total_norm(gradients)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all ranks, on this rank's device and of the same type; the argument stays as
        it is."""
        import torch

        total = tensor.detach().to(self.device, copy=True)
        if self.world > 1:
            torch.distributed.all_reduce(total)
        return total

    def broadcast_object(self, value: T) -> T:
        """Returns rank 0's value on every rank (pickled: only between our own ranks)."""
        import torch

        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, by rank (pickled: only between our own ranks)."""
        import torch

        found: list[Any] = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def unwrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """Returns the module that was given to `prepare`."""
        wrapped = type(module).__name__ == self.wrapper
        # accelerate's own imports deepspeed
        return cast("torch.nn.Module", module.module) if wrapped else module

    def full_state(
        self, module: torch.nn.Module, trainable: bool = False, prefix: str = ""
    ) -> dict[str, torch.Tensor]:
        """Returns whole tensors by name, for saving; complete on rank 0, on other ranks a backend may return
        less.

        All ranks call it. trainable: only parameters that are trained (an adapter), else the whole state
        dict; prefix: keep the names that begin with it, without it (`full_state(module, prefix="model.")`).
        """
        inner = self.unwrap(module)
        if trainable:
            state = {name: p.detach() for name, p in inner.named_parameters() if p.requires_grad}
        else:
            state = {name: value.detach() for name, value in inner.state_dict().items()}
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def save_state(self, folder: Path | str) -> None:
        """Writes what an exact resume needs: trained parameters, optimizer, loss scaler, random states of
        each rank.

        All ranks call it, after `prepare`. Layout: engine.json, shard-<rank>.safetensors by each rank that
        keeps a part of the optimizer (see `sharded_state`), rng-<rank>.pt by each rank. Parameters that are
        not trained are not written: they come from the base model. Not atomic: the caller writes into a
        temporary folder and renames it after all ranks have returned.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.divided or self.is_main:
            sharded_state.save(
                self._shards(), self._base_optimizer(), folder / f"shard-{self.rank}.safetensors"
            )
        if self.is_main:
            shards = self.world if self.divided else 1
            values = {
                "dist": self.name,
                "world": self.world,
                "shards": shards,
                "scaler": self._scaler_state(),
            }
            (folder / "engine.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        rng.save(folder / f"rng-{self.rank}.pt")
        self.barrier()

    def load_state(self, folder: Path | str) -> bool:
        """Restores what `save_state` wrote, of this or of another backend, on any number of ranks. All ranks
        call it.

        Call it last before training continues: anything random in between would be drawn from the restored
        states. Returns whether the layout is the same, so that the run continues bit-identically; with
        another one the losses are equal to rounding, and ranks without a saved random state keep the one they
        have. Raises UserError when the state is not complete, is of another model, or does not fit another
        layout.
        """
        folder = Path(folder)
        saved = read_state(folder)
        assert self._module is not None, "prepare first"
        trained = {name for name, p in self.unwrap(self._module).named_parameters() if p.requires_grad}
        sharded_state.load(self._shards(), self._base_optimizer(), folder, trained)
        self._sync_computed_weights()
        if saved["scaler"]:
            self._load_scaler(saved["scaler"])
        random = folder / f"rng-{self.rank}.pt"
        if random.exists():
            rng.load(random)
        self.barrier()
        return bool(saved["dist"] == self.name and saved["world"] == self.world)

    def _shards(self) -> list[sharded_state.Shard]:
        """Returns what this rank updates: whole parameters."""
        assert self._module is not None, "prepare first"
        trained = [(name, p) for name, p in self.unwrap(self._module).named_parameters() if p.requires_grad]
        return [sharded_state.Shard(name, 0, p.detach().view(-1), p, 0) for name, p in trained]

    def _base_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer inside accelerate's or DeepSpeed's."""
        return cast("torch.optim.Optimizer", self._optimizer.optimizer)

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
        """Ends the process group that it made and frees what accelerate holds; the process may start another
        engine."""
        import torch
        from accelerate.state import AcceleratorState, GradientState

        self._module = self._optimizer = None
        self.accelerator.free_memory()
        if self._owns_group and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # accelerate keeps its state in process-wide singletons and offers no public way to end them
        # private of accelerate (read in 1.15); tests/distributed/test_private_apis.py holds it
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def read_state(folder: Path) -> dict[str, Any]:
    """Returns engine.json of a resume state; UserError when it is damaged, or a file that it counts on is
    missing."""
    path = folder / "engine.json"
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shards = [f"shard-{rank}.safetensors" for rank in range(saved["shards"])]
        needed = [*shards, *(f"rng-{rank}.pt" for rank in range(saved["world"]))]
        if not (shards and isinstance(saved["dist"], str) and isinstance(saved["scaler"], dict)):
            raise ValueError("values of another shape")
    except FileNotFoundError:
        raise UserError(f"{folder} is not a complete resume state: {path.name} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    for name in needed:
        if not (folder / name).exists():
            raise UserError(f"{folder} is not a complete resume state: {name} is missing")
    return saved
