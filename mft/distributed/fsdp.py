"""PyTorch's FSDP2, fully sharded data parallel: a rank holds its shard of parameters, gradients, optimizer.

`fully_shard` is called here and not by accelerate, which on a CPU silently turns an FSDP plugin into plain
DDP, and under bf16 casts the losses that the model returns to bf16 (steps of 0.03).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mft.distributed import torch_private
from mft.distributed.engine import Engine
from mft.distributed.process_group import GroupBackend
from mft.distributed.sharded_state import Shard, local
from mft.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


class FsdpEngine(Engine):
    """Parameters are DTensors; a layer is gathered while it computes."""

    name = "fsdp"
    kinds = ("MULTI_CPU", "MULTI_GPU")
    parameters = "DTensors"
    divided = True

    def __init__(self, accelerator: Accelerator, owns_group: bool, settings: Fsdp):
        super().__init__(accelerator, owns_group)
        self.settings = settings
        self.gather_on_save = settings.gather_on_save

    def loading(self, quantised: bool = False) -> AbstractContextManager[torch.device | None]:
        """Only the first rank of each machine reads the weights; the others get theirs in `prepare`.

        Each rank packs those that are quantised while they load, in the CPU's memory: transformers would put
        the whole model on the device.
        """
        import torch
        from accelerate.utils import patch_environment

        if quantised:
            return nullcontext(torch.device("cpu"))
        # by which transformers leaves the weights of all but the first rank on the meta device
        variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        return patch_environment(**variables)  # type: ignore[no-any-return]

    def _wrap(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Shards the module in place, layer by layer, so that one layer at a time is whole on the device."""
        from torch.distributed.fsdp import fully_shard

        # `fully_shard` replaces parameters by DTensors: the optimizer's groups find theirs again by name
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        names_by_group = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = []  # the optimizer must not keep the whole parameters alive
        options = self.settings.options(self.accelerator.mixed_precision, self.device)
        done: set[int] = set()
        for unit in [*self._units(module), module]:
            self._fill(unit, done)
            # None: the root stays gathered between its forward and its backward, which follow each other
            reshard = None if unit is module else self.settings.reshard
            fully_shard(unit, reshard_after_forward=reshard, **options)
            done |= {id(p) for p in unit.parameters()}
        parameters = dict(module.named_parameters())
        for group, group_names in zip(optimizer.param_groups, names_by_group, strict=True):
            group["params"] = [parameters[name] for name in group_names]
        return module, self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def _units(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """Returns the decoder layers. A model may lack some of its family's class names for them."""
        classes: list[str] = getattr(module, "layer_classes", list)()
        units = [part for part in module.modules() if type(part).__name__ in classes]
        if not units:
            hint = nearest(classes[0], {type(part).__name__ for part in module.modules()}) if classes else ""
            raise UserError(
                f"model.shard_layers={classes}: the model has no such layer, which dist=fsdp needs{hint}"
            )
        return units

    def _fill(self, unit: torch.nn.Module, done: set[int]) -> None:
        """Gives what is not sharded yet in `unit` its place on the device and rank 0's values."""
        # only rank 0 has read the weights (see `loading`): it sends each unit to the others
        filled: dict[int, torch.nn.Parameter] = {}  # tied parameters stay one
        for part in unit.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is None or id(parameter) in done:
                    continue
                if id(parameter) not in filled:
                    filled[id(parameter)] = self._of_rank_0(parameter)
                part._parameters[name] = filled[id(parameter)]
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[name] = self._of_rank_0(buffer)
            # the scales of a 4-bit layer of bitsandbytes, which are neither parameters nor buffers
            if (scales := getattr(part, "quant_state", None)) is not None:
                scales.to(self.device)

    def _of_rank_0(self, tensor: Any) -> Any:
        """Returns rank 0's tensor, on the device; a parameter as a parameter."""
        import torch

        if tensor.device.type == "meta":
            value = torch.empty_like(tensor, device=self.device)
        else:
            value = tensor.data.to(self.device)
        torch.distributed.broadcast(value, src=0)
        if not isinstance(tensor, torch.nn.Parameter):
            return value
        return torch.nn.Parameter(value, requires_grad=tensor.requires_grad)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Exchanges gradients in the last micro-batch only, or in each: then no rank keeps whole ones."""
        self._module.set_requires_gradient_sync(last or self.settings.reduce_every_micro_batch)
        return nullcontext()

    def full_state(self, trainable: bool = False) -> dict[str, torch.Tensor]:
        self._reshard()  # else a validation has left the root's parameters whole
        return super().full_state(trainable)

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        full = tensor.detach()
        full = full.full_tensor() if isinstance(full, DTensor) else full
        return full.cpu() if self.is_main else full.new_empty(0)

    def _reshard(self) -> None:
        """Gives back what a forward without a backward, as in an evaluation, has left gathered.

        The root's parameters would be the whole ones, whose memory fsdp frees later.
        """
        from torch.distributed.fsdp import FSDPModule

        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _shards(self) -> list[Shard]:
        """Returns the rows of each trained parameter that this rank keeps."""
        self._reshard()
        shards = []
        for name, parameter in self.model.named_parameters():
            mine = local(parameter)
            if not parameter.requires_grad or not mine.numel():
                continue
            # FSDP2 divides dimension 0 as torch.chunk does: the last ranks may have fewer rows, or none
            rows_per_rank = -(-parameter.shape[0] // self.world)
            start = self.rank * rows_per_rank * (parameter.numel() // parameter.shape[0])
            shards.append(Shard(name, start, mine.view(-1), parameter, 0))
        return shards


@dataclass
class Fsdp(GroupBackend):
    """PyTorch's FSDP2. Sharding unit: the family's decoder layer (`model.shard_layers`)."""

    public_name: ClassVar[str] = "fsdp"
    divides_into_dtensors: ClassVar[bool] = True
    casts_weights: ClassVar[bool] = True
    """A unit is gathered in the run's precision."""

    reshard: bool = True
    """Free a layer's gathered parameters after its forward and gather them again for its backward."""
    offload: bool = False
    """Keep this rank's parts of parameters, gradients and optimizer in the CPU's memory; slow."""
    reduce_every_micro_batch: bool = False
    """Exchange gradients in every micro-batch instead of keeping whole ones until the step's last."""
    gather_on_save: bool = True
    """Whether checkpoints also hold the model as transformers or peft load it; `final/` does in any case."""

    def divided_parts(self) -> set[str]:
        return {"weights", "gradients", "optimizer"}

    def casts_whole_numbers(self) -> bool:
        return torch_private.gathers_cast_whole_numbers()

    def start(self, precision: str, cpu: bool | None = None) -> FsdpEngine:
        import torch

        # NCCL cannot add up parts in the CPU's memory; on a CPU accelerate takes no other group than gloo's
        gpu = torch.cuda.is_available() and not cpu
        both = "cuda:nccl,cpu:gloo" if self.offload and gpu else None
        return FsdpEngine(*self.grouped(precision, cpu, backend=both), self)

    def options(self, mixed_precision: str, device: torch.device) -> dict[str, Any]:
        """Returns the arguments of `fully_shard`; mixed_precision: accelerate's name of it."""
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
        # inputs and outputs keep their type: the losses are float32
        sums = torch.float32 if half else None  # gradients are added up in fp32
        policy = MixedPrecisionPolicy(half, sums, output_dtype=None, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if self.offload else OffloadPolicy()
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        return {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
