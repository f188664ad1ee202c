"""A device that a CPU pretends to have, which notes whenever the host would wait for it.

Tensors on it say `device=cuda:0`, hold their values in an ordinary tensor, and compute on the CPU. What a GPU
would have to answer before the host could go on is noted, with its place in the code:

- operations whose result the host reads, or whose result's size depends on values: `nonzero`, `.item()`,
  `float()`, `bool()`, `tolist`, boolean indices, `masked_select`, `unique`, `bincount`, `equal`;
- copies from the device;
- copies to it, unless they are `non_blocking` and from pinned memory.

Tensors of both devices in one operation raise, as on a GPU. Kernels inside libraries (NCCL, flash attention)
are not there, nor is what a CUDA implementation waits for on its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
READING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "is_nonzero"),
    *(
        "masked_scatter_backward",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "repeat_interleave",
    ),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class OnGpu(torch.Tensor):
    """A tensor on the pretended device. To torch's C++ it is on the device "meta", of which no build lacks
    anything."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device="meta",
        )
        made.value = value
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=self.dtype, **options).to(GPU)

    def __repr__(self, *_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of `watched`")


class Watch(TorchDispatchMode):
    """Computes for the pretended device; `waits` holds "operation at file:line" of each wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: dict[int, torch.Tensor] = {}

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stands for `Tensor.pin_memory`."""
        copy = tensor.clone()
        self._pinned[id(copy)] = copy  # kept: another tensor must not get its id
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = any(isinstance(tensor, OnGpu) for tensor in tensors)
        here = ours
        if (device := kwargs.get("device")) is not None:
            here = device.type in ("cuda", "meta")
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if name in ("_to_copy", "copy_"):
            here = self._copied(name, args, kwargs, ours, here)
        else:
            self._read(func, name, args, tensors, ours)
        originals = {id(tensor.value): tensor for tensor in tensors if isinstance(tensor, OnGpu)}

        def result(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return originals.get(id(value)) if id(value) in originals else OnGpu(value) if here else value

        if name == "histc":  # which on a CPU takes no integers
            args = (args[0].value.float(), *args[1:])
        plain = lambda leaf: leaf.value if isinstance(leaf, OnGpu) else leaf  # noqa: E731
        return tree_map(result, func(*tree_map(plain, args), **tree_map(plain, kwargs)))

    def _copied(self, name: str, args: Any, kwargs: Any, ours: bool, here: bool) -> bool:
        """Notes a copy between host and device; returns whether its result is on the device."""
        if name == "_to_copy":
            source, non_blocking = args[0], kwargs.get("non_blocking", False)
        else:
            here, source = isinstance(args[0], OnGpu), args[1]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        from_here = isinstance(source, OnGpu)
        if from_here and not here:
            self._note(f"{name} to the host")
        elif here and not from_here and not (non_blocking and id(source) in self._pinned):
            self._note(f"{name} to the device, blocking or from memory that is not pinned")
        return here

    def _read(self, func: Any, name: str, args: Any, tensors: list[torch.Tensor], ours: bool) -> None:
        if not ours:
            return
        indices = [index for index in args[1] if index is not None] if name in INDEXING else []
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            # one value is filled in by the mask itself
            if name in ("index", "_unsafe_index") or args[2].numel() != 1:
                self._note(f"{name} by a mask")
        elif name in READING:
            self._note(name)
        if foreign := [t for t in tensors if not isinstance(t, OnGpu) and t.dim()]:
            if name not in INDEXING:
                raise RuntimeError(f"{func}: tensors of both devices, {foreign[0].shape} on the CPU")
            self._note(f"{name} by an index that is on the host")

    def _note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        asking = [frame for frame in frames if frame.filename != __file__][-1]
        self.waits.append(f"{what} at {asking.filename.rsplit('/', 2)[-1]}:{asking.lineno}")


@contextmanager
def watched() -> Iterator[Watch]:
    """Context in which the device is there; what a CPU lacks of torch.cuda is given.

    Models are made outside: there, the device "meta" is the ordinary one.
    """
    watch, made = Watch(), torch.tensor

    def tensor(data: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return made(data, **options).to(device or "cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: watch.pin(tensor))
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        # the allocator's own counters, which the host has at hand
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
        patch.setattr(torch.cuda, "max_memory_reserved", lambda device: 0)
        patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
        with watch:
            yield watch


def move(module: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Moves a module's weights and buffers to the device, and the parameters in an optimizer without state."""
    moved: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    new = torch.nn.Parameter(OnGpu(parameter.detach()), parameter.requires_grad)
                    moved[id(parameter)] = new
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnGpu(buffer)
    for group in optimizer.param_groups if optimizer else ():
        group["params"] = [moved[id(parameter)] for parameter in group["params"]]
