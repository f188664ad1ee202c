"""What an engine saves and loads: whole weights, and its own state for an exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.distributed import rng, sharded_state
from mft.distributed.ranks import Ranks
from mft.distributed.sharded_state import read_state

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


class EngineState(Ranks):
    """The part of an engine that is saved; a backend that shards overrides the private methods that differ."""

    name = "single"
    divided = False
    """Whether each rank keeps its part of the optimizer's state, and writes a file of the resume state."""

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.accelerator = accelerator
        self.model: torch.nn.Module
        """The module given to `prepare`."""
        self._optimizer: Any = None

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
