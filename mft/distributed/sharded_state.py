"""The resume state of any backend on any number of ranks: each rank's shards of the flattened trained
parameters.

However a backend divides a parameter (whole, by rows, by a run of a flat buffer), what a rank keeps of it is
a run of consecutive elements. Each rank writes its runs with the optimizer's numbers for them into
shard-<rank>.safetensors; each rank of the next start reads what overlaps its own runs, from whichever files
hold it. With the same layout these are the same runs, so nothing is lost; there is no conversion between
layouts, and nothing that would be unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass
class Shard:
    """A run of consecutive elements of one flattened parameter, on the rank that updates them.

    name: of the parameter; start: its first element there; values: the elements themselves, a 1-D view of
    what the optimizer updates; owner: the tensor by which the optimizer knows them; offset: their place in
    the flattened owner.
    """

    name: str
    start: int
    values: torch.Tensor
    owner: torch.Tensor
    offset: int

    def of(self, state: torch.Tensor) -> torch.Tensor:
        """Returns this shard's part of a tensor of the optimizer that has the owner's shape, as a view."""
        return local(state).view(-1).narrow(0, self.offset, self.values.numel())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a DTensor, any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(shards: Sequence[Shard], optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Writes the shards of this rank and what the optimizer keeps for them."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    index = []
    for number, shard in enumerate(shards):
        tensors[f"{number}"] = shard.values
        scalars: dict[str, Any] = {}
        blocks = _in_blocks(shard.owner, optimizer)
        for key, value in optimizer.state.get(shard.owner, {}).items():
            if _is_scalar(value):
                scalars[key] = {"value": value.item()} if hasattr(value, "item") else value
            elif not blocks:
                tensors[f"{number}/{key}"] = shard.of(value)
            elif shard.offset == 0:  # all that is kept for the owner, once
                tensors[f"{number}/{key}"] = local(value)
        index.append({"name": shard.name, "start": shard.start, "scalars": scalars, "blocks": blocks})
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    save_file(copies, path, metadata={"pieces": json.dumps(index)})


def _is_scalar(value: Any) -> bool:
    return not hasattr(value, "dim") or value.dim() == 0


def _in_blocks(owner: torch.Tensor, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer keeps something for the owner that is not a number per element, as 8-bit states
    are."""
    values = optimizer.state.get(owner, {}).values()
    return any(not _is_scalar(value) and value.shape != owner.shape for value in values)


@dataclass
class _Saved:
    """A shard in a file: numel elements from `start` on; keys: tensors that the optimizer kept for it."""

    file: Any
    number: int
    start: int
    numel: int
    scalars: dict[str, Any]
    blocks: bool
    keys: list[str]

    def tensor(self, key: str) -> Any:
        """Returns the tensor, unread: a slice of it reads what it covers."""
        return self.file.get_slice(f"{self.number}/{key}" if key else f"{self.number}")


def load(shards: Sequence[Shard], optimizer: torch.optim.Optimizer, folder: Path, trained: set[str]) -> None:
    """Puts the saved values and the optimizer's state into this rank's shards.

    trained: names of all trained parameters, of all ranks. Raises UserError when the saved parameters are
    others, when an element is in no file, and when the optimizer's state is in blocks that fit the layout
    that wrote them only.
    """
    import torch

    saved = _read(folder)
    if set(saved) != trained:
        only = sorted(set(saved) ^ trained)
        raise UserError(
            f"{folder} does not fit the model: {len(only)} parameters are only in one of them, e.g. {only[0]}"
        )
    with torch.no_grad():
        for shard in shards:
            found = saved[shard.name]
            _fill(shard.values, shard, found, "", folder)
            if any(other.blocks for other in found):
                _load_blocks(shard, optimizer, found, folder)
                continue
            state = optimizer.state[shard.owner]
            for key in found[0].keys:
                if key not in state:  # the optimizer has not stepped yet
                    state[key] = torch.zeros_like(shard.owner, dtype=found[0].tensor(key)[:0].dtype)
                _fill(shard.of(state[key]), shard, found, key, folder)
            _load_scalars(shard, optimizer, found[0])


def _read(folder: Path) -> dict[str, list[_Saved]]:
    """Returns the shards in the files of a folder by the name of their parameter; only headers are read."""
    from safetensors import safe_open

    saved: dict[str, list[_Saved]] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        file = safe_open(str(path), framework="pt")
        keys: dict[int, list[str]] = {}
        for name in list(file.keys()):
            number, _, key = name.partition("/")
            keys.setdefault(int(number), []).extend([key] if key else [])
        for number, entry in enumerate(json.loads(file.metadata()["pieces"])):
            numel = file.get_slice(f"{number}").get_shape()[0]
            shard = _Saved(
                file, number, entry["start"], numel, entry["scalars"], entry["blocks"], keys[number]
            )
            saved.setdefault(entry["name"], []).append(shard)
    return saved


def _fill(target: torch.Tensor, shard: Shard, found: Sequence[_Saved], key: str, folder: Path) -> None:
    """Copies what the saved shards share with this one."""
    done = 0
    for other in found:
        first = max(shard.start, other.start)
        last = min(shard.start + shard.values.numel(), other.start + other.numel)
        if first < last:
            values = other.tensor(key)[first - other.start : last - other.start]
            target[first - shard.start : last - shard.start].copy_(values)
            done += last - first
    if done != target.numel():
        raise UserError(
            f"{folder} does not fit the model: {done} of the {target.numel()} elements of {shard.name} "
            f"from number {shard.start} on are in its files"
        )


def _load_scalars(shard: Shard, optimizer: torch.optim.Optimizer, saved: _Saved) -> None:
    import torch

    # torch keeps the step counters of its fused and capturable optimizers on the device, others on the CPU
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for key, value in saved.scalars.items():
        if isinstance(value, dict):
            device = shard.owner.device if on_device else "cpu"
            value = torch.tensor(value["value"], dtype=torch.float32, device=device)
        optimizer.state[shard.owner][key] = value


def _load_blocks(
    shard: Shard, optimizer: torch.optim.Optimizer, found: Sequence[_Saved], folder: Path
) -> None:
    """Takes over an owner's state as a whole, which works only where the same shard was saved."""
    same = [other for other in found if (other.start, other.numel) == (shard.start, shard.values.numel())]
    if not same:
        raise UserError(
            f"{folder} was written on another number of ranks, and {type(optimizer).__name__} keeps its "
            f"state in "
            "blocks that cannot be resharded; resume with the same number of ranks, or train with dist=ddp"
        )
    for key in same[0].keys:
        optimizer.state[shard.owner][key] = same[0].tensor(key)[:].to(shard.owner.device)
    _load_scalars(shard, optimizer, same[0])
