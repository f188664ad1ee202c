"""PyTorch's fully sharded data parallel, version 2: each rank holds its part of parameters, gradients and
optimizer.

`fully_shard` is called here and not by accelerate, which on a CPU silently turns an FSDP plugin into plain
DDP, and under bf16 casts the losses that the model returns to bf16 (steps of 0.03).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mft.distributed.accelerator import environment, grouped
from mft.distributed.engine import Backend, Engine, T
from mft.distributed.sharded_state import Shard, local
from mft.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


class FsdpEngine(Engine):
    """Parameters are DTensors; a layer is gathered while it computes."""

    name = "fsdp"
    kinds = ("MULTI_CPU", "MULTI_GPU")
    sharded = True
    divided = True

    def __init__(self, accelerator: Accelerator, owns_group: bool, settings: Fsdp):
        super().__init__(accelerator, owns_group)
        self.settings = settings
        self.gather_on_save = settings.gather_on_save

    def loading(self) -> AbstractContextManager[None]:
        """Only the first rank of each machine reads the weights; on the others they have no memory until
        `prepare`."""
        return self._first_rank_loading()

    @contextmanager
    def _first_rank_loading(self) -> Iterator[None]:
        with environment({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}):
            yield

    def prepare(self, module: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Returns the module, sharded in place layer by layer, and the optimizer over its shards."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self._require_trained(module)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        grouped_names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = []  # the whole parameters are freed one by one below
        del names
        options = self.settings.options(self.accelerator.mixed_precision, self.device)
        units = self._units(module)
        done: set[int] = set()
        for unit in [*units, module]:
            self._fill(unit, done)
            fully_shard(
                unit, reshard_after_forward=None if unit is module else self.settings.reshard, **options
            )
            done |= {id(p) for p in unit.parameters()}
        parameters = dict(module.named_parameters())
        for group, group_names in zip(optimizer.param_groups, grouped_names, strict=True):
            group["params"] = [parameters[name] for name in group_names]
        if not isinstance(module, FSDPModule):
            raise UserError("dist=fsdp did not start as configured: the model is not sharded")
        self._verify_sharding(next(module.parameters()))
        self._module, self._optimizer = (
            module,
            self.accelerator.prepare_optimizer(optimizer, device_placement=False),
        )
        return module, self._optimizer

    def _units(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """Returns the decoder layers. Of the class names that transformers has for a family a model may lack
        some."""
        asked: list[str] = getattr(module, "layer_classes", list)()
        units = [part for part in module.modules() if type(part).__name__ in asked]
        if not units:
            hint = nearest(asked[0], {type(part).__name__ for part in module.modules()}) if asked else ""
            raise UserError(
                f"dist=fsdp finds no decoder layer to divide the model by: model.shard_layers={asked}, and "
                f"none of its modules is of such a class{hint}"
            )
        return units

    def _fill(self, unit: torch.nn.Module, done: set[int]) -> None:
        """Gives what is not sharded yet in `unit` its place on the device and rank 0's values."""
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

    def _of_rank_0(self, tensor: Any) -> Any:
        import torch

        if tensor.device.type == "meta":
            value = torch.empty_like(tensor, device=self.device)
        else:
            value = tensor.data.to(self.device)
        torch.distributed.broadcast(value, src=0)
        if not isinstance(tensor, torch.nn.Parameter):
            return value
        return torch.nn.Parameter(value, requires_grad=tensor.requires_grad)

    def _verify_sharding(self, first: torch.nn.Parameter) -> None:
        from torch.distributed.tensor import DTensor

        if not isinstance(first, DTensor):
            raise UserError(
                f"dist=fsdp did not start as configured: the first parameter is a {type(first).__name__}"
            )

    def run_as_forward(self, call: Callable[[], T]) -> T:
        """See `Engine.inside`; gathered parameters come in the run's precision."""
        return self._in_place_of_forward(call)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Exchanges gradients in the last micro-batch only, or in each, which keeps just a part of them on a
        rank."""
        assert self._module is not None, "prepare first"
        self._module.set_requires_gradient_sync(last or self.settings.reduce_every_micro_batch)  # type: ignore[operator]
        return nullcontext()

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        import torch
        from torch.distributed.tensor import DTensor

        total = torch.nn.utils.get_total_norm(gradients)
        return total.full_tensor() if isinstance(total, DTensor) else total

    def unwrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """Returns the module itself: it was sharded in place."""
        return module

    def full_state(
        self, module: torch.nn.Module, trainable: bool = False, prefix: str = ""
    ) -> dict[str, torch.Tensor]:
        """One parameter after the other is gathered; rank 0 copies it to the CPU, the others return
        nothing."""
        from torch.distributed.tensor import DTensor

        self._reshard(module)
        state: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}  # a tied weight stays tied
        if trainable:
            values: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        else:
            values = module.state_dict(keep_vars=True)
        for name, value in values.items():
            if not name.startswith(prefix):
                continue
            if id(value) not in copies:
                whole = value.detach()
                whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
                copies[id(value)] = whole.cpu() if self.is_main else whole.new_empty(0)
            if self.is_main:
                state[name.removeprefix(prefix)] = copies[id(value)]
        return state

    def _reshard(self, module: torch.nn.Module) -> None:
        """Gives back what a forward without a backward, as in an evaluation, has left gathered: the root's
        parameters would be the whole ones, whose memory fsdp frees later."""
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _shards(self) -> list[Shard]:
        """Returns the rows of each trained parameter that this rank keeps."""
        assert self._module is not None, "prepare first"
        self._reshard(self._module)
        found = []
        for name, parameter in self._module.named_parameters():
            mine = local(parameter)
            if not parameter.requires_grad or not mine.numel():
                continue
            rows = -(-parameter.shape[0] // self.world)  # the last ranks may have fewer, or none
            start = self.rank * rows * (parameter.numel() // parameter.shape[0])
            found.append(Shard(name, start, mine.view(-1), parameter, 0))
        return found


@dataclass
class Fsdp(Backend):
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

    def start(self, precision: str, cpu: bool | None = None) -> FsdpEngine:
        """Returns the engine of this rank. precision: bf16, fp16 or fp32; cpu: None takes a GPU where there
        is one.

        Raises UserError when the device cannot do the precision or the group is not what was asked.
        """
        import torch
        from accelerate import InitProcessGroupKwargs

        # NCCL cannot add up parts in the CPU's memory; a group on a CPU is gloo's, and accelerate takes no
        # other
        gpu = torch.cuda.is_available() and not cpu
        both = [InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")] if self.offload and gpu else []
        return FsdpEngine(*grouped(precision, cpu, *both), self)

    def options(self, mixed_precision: str, device: torch.device) -> dict[str, Any]:
        """Returns the arguments of `fully_shard`; mixed_precision: accelerate's name of it."""
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
        # inputs and outputs keep their type: the losses are float32
        policy = MixedPrecisionPolicy(
            half, torch.float32 if half else None, output_dtype=None, cast_forward_inputs=False
        )
        offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if self.offload else OffloadPolicy()
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        return {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
