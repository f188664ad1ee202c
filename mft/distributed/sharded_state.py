"""The resume state of any backend on any number of ranks: shards of the flattened trained parameters.

However a backend divides a parameter (whole, by rows, by a run of a flat buffer), what a rank keeps of it is
a run of consecutive elements. Each rank writes its runs into shard-<rank>.safetensors and the optimizer's
numbers for them into optimizer-<rank>.safetensors; each rank of the next start reads what overlaps its own
runs, from whichever files hold it. With the same layout these are the same runs, so nothing is lost; there is
no conversion between layouts, and nothing that would be unpickled. The weights can be read without the
optimizer's files. Earlier versions wrote both into shard-<rank>.safetensors, which is read, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.files.tensor_file import size_of, write_tensors

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open


@dataclass
class Shard:
    """A run of consecutive elements of one flattened parameter, on the rank that updates them."""

    name: str
    """Of the parameter."""
    start: int
    """Its first element in the flattened parameter."""
    values: torch.Tensor
    """The elements themselves, a 1-D view of what the optimizer updates."""
    owner: torch.Tensor
    """The tensor by which the optimizer knows them: the parameter, or ZeRO's flat buffer."""
    offset: int
    """Their first element in the flattened owner."""

    def of(self, state: torch.Tensor) -> torch.Tensor:
        """Returns this shard's part of a tensor of the optimizer that has the owner's shape, as a view."""
        return local(state).view(-1).narrow(0, self.offset, self.values.numel())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a DTensor, any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(shards: Sequence[Shard], optimizer: torch.optim.Optimizer, folder: Path, rank: int) -> None:
    """Writes the shards of this rank and what the optimizer keeps for them; nothing is copied as a whole."""
    for kind, content in contents(shards, optimizer).items():
        write_tensors(folder / f"{kind}-{rank}.safetensors", *content)


def size(shards: Sequence[Shard], optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes that `save` would write."""
    return sum(size_of(*content) for content in contents(shards, optimizer).values())


def contents(
    shards: Sequence[Shard], optimizer: torch.optim.Optimizer
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """Returns the tensors, as views, and the metadata of each file of this rank, by how its name begins."""
    weights: dict[str, torch.Tensor] = {}  # by the number of the shard
    of_optimizer: dict[str, torch.Tensor] = {}  # number/key
    places, pieces = [], []
    for number, shard in enumerate(shards):
        weights[f"{number}"] = shard.values
        scalars: dict[str, Any] = {}
        state = optimizer.state.get(shard.owner, {})
        kept = {key: value for key, value in state.items() if not _is_scalar(value)}
        # 8-bit states are kept in blocks with a scale each, not as a number per element
        blocks = any(value.shape != shard.owner.shape for value in kept.values())
        for key, value in state.items():
            if key not in kept:
                scalars[key] = {"value": value.item()} if hasattr(value, "item") else value
            elif not blocks:
                of_optimizer[f"{number}/{key}"] = shard.of(value)
            elif shard.offset == 0:  # all that is kept for the owner, once
                of_optimizer[f"{number}/{key}"] = local(value)
        places.append({"name": shard.name, "start": shard.start})
        pieces.append({"name": shard.name, "scalars": scalars, "blocks": blocks})
    return {
        "shard": (weights, {"pieces": json.dumps(places)}),
        "optimizer": (of_optimizer, {"pieces": json.dumps(pieces)}),
    }


def _is_scalar(value: torch.Tensor | float) -> bool:
    return not hasattr(value, "dim") or value.dim() == 0


@dataclass
class _Saved:
    """A shard in a file."""

    weights: safe_open
    """The file of its elements."""
    optimizer: safe_open
    """The file of what the optimizer kept for it."""
    number: int
    """Of the shard in the files: the tensors' names begin with it."""
    numel: int
    keys: list[str]
    """Of the tensors that the optimizer kept for it."""
    start: int
    scalars: dict[str, Any]
    """What else the optimizer kept, such as the number of steps."""
    blocks: bool
    """Whether those tensors are kept in blocks, not a number per element."""

    def tensor(self, key: str) -> Any:
        """Returns an unread tensor: a slice of it reads what it covers. key: "" for the elements."""
        name = f"{self.number}"
        return self.optimizer.get_slice(f"{name}/{key}") if key else self.weights.get_slice(name)


def load(
    shards: Sequence[Shard], optimizer: torch.optim.Optimizer | None, folder: Path, trained: set[str]
) -> None:
    """Puts the saved values and the optimizer's state into this rank's shards.

    optimizer: None reads the values alone, which is possible also where nothing else was kept; trained: names
    of all trained parameters, of all ranks. Raises UserError when the saved parameters are others, when an
    element is in no file, and when the optimizer's state is in blocks that fit the layout that wrote them
    only.
    """
    import torch

    saved = _read(folder, values_alone=optimizer is None)
    if set(saved) != trained:
        only = sorted(set(saved) ^ trained)
        difference = f"{len(only)} parameters are only in one of them, e.g. {only[0]}"
        raise UserError(f"{folder} does not fit the model: {difference}")
    with torch.no_grad():
        for shard in shards:
            _fill(shard.values, shard, saved[shard.name], "", folder)
            if optimizer is not None:
                _load_optimizer(shard, optimizer, saved[shard.name], folder)


def _load_optimizer(
    shard: Shard, optimizer: torch.optim.Optimizer, parts: Sequence[_Saved], folder: Path
) -> None:
    import torch

    source = parts[0]
    if any(part.blocks for part in parts):
        source = _same_shard(shard, optimizer, parts, folder)
        for key in source.keys:
            optimizer.state[shard.owner][key] = source.tensor(key)[:].to(shard.owner.device)
    else:
        state = optimizer.state[shard.owner]
        for key in source.keys:
            if key not in state:  # the optimizer has not stepped yet
                state[key] = torch.zeros_like(shard.owner, dtype=source.tensor(key)[:0].dtype)
            _fill(shard.of(state[key]), shard, parts, key, folder)
    _load_scalars(shard, optimizer, source)


def _read(folder: Path, values_alone: bool) -> dict[str, list[_Saved]]:
    """Returns the shards in the files of a folder by the name of their parameter; only headers are read."""
    from safetensors import safe_open

    saved: dict[str, list[_Saved]] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        # stays open: `_Saved.tensor` reads slices of it, so that no rank holds another one's shards
        weights = optimizer = safe_open(str(path), framework="pt")
        entries = json.loads(weights.metadata()["pieces"])
        pieces: list[dict[str, Any]] = [{"scalars": {}, "blocks": False} for _ in entries]
        if not values_alone and any("blocks" not in entry for entry in entries):
            beside = path.with_name(path.name.replace("shard", "optimizer"))
            optimizer = safe_open(str(beside), framework="pt")
            pieces = json.loads(optimizer.metadata()["pieces"])
        keys: dict[int, list[str]] = {}
        for name in list(optimizer.keys()):
            number, _, key = name.partition("/")
            keys.setdefault(int(number), []).extend([key] if key else [])
        for number, (entry, piece) in enumerate(zip(entries, pieces, strict=True)):
            values = piece | entry  # an entry of an earlier version has what is a piece's now
            name, numel = values.pop("name"), weights.get_slice(f"{number}").get_shape()[0]
            part = _Saved(weights, optimizer, number, numel, keys.get(number, []), **values)
            saved.setdefault(name, []).append(part)
    return saved


def _fill(target: torch.Tensor, shard: Shard, parts: Sequence[_Saved], key: str, folder: Path) -> None:
    """Copies the elements that the saved parts and this shard have in common."""
    done = 0
    for part in parts:
        first = max(shard.start, part.start)
        last = min(shard.start + shard.values.numel(), part.start + part.numel)
        if first < last:
            values = part.tensor(key)[first - part.start : last - part.start]
            target[first - shard.start : last - shard.start].copy_(values)
            done += last - first
    if done != target.numel():
        raise UserError(
            f"{folder} does not fit the model: its files hold {done} of the {target.numel()} elements of "
            f"{shard.name} from number {shard.start} on"
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


def _same_shard(
    shard: Shard, optimizer: torch.optim.Optimizer, parts: Sequence[_Saved], folder: Path
) -> _Saved:
    """Returns the saved shard with the same elements; an owner's blocks cannot be divided."""
    for part in parts:
        if (part.start, part.numel) == (shard.start, shard.values.numel()):
            return part
    kind = type(optimizer).__name__
    raise UserError(
        f"{folder} was written on another number of ranks, and {kind} keeps its state in blocks that cannot "
        "be resharded; resume with the same number of ranks, or train with dist=ddp"
    )


def read_state(folder: Path) -> dict[str, Any]:
    """Returns engine.json of a resume state; UserError if it is damaged or a file it names is missing."""
    path = folder / "engine.json"
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shards = [f"shard-{rank}.safetensors" for rank in range(saved["shards"])]
        # of an earlier version the shards hold the optimizer's numbers, too
        optimizers = [f"optimizer-{rank}.safetensors" for rank in range(saved.get("optimizers", 0))]
        files = [*shards, *optimizers, *(f"rng-{rank}.pt" for rank in range(saved["world"]))]
        if not (shards and isinstance(saved["dist"], str) and isinstance(saved["scaler"], dict)):
            raise ValueError("values of another shape")
    except FileNotFoundError:
        files = [path.name]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    for name in files:
        if not (folder / name).exists():
            raise UserError(f"{folder} is not a complete resume state: {name} is missing")
    return saved
