"""Optimizers as dataclasses of plain values; `build` makes the live one for a model's trained parameters."""

from __future__ import annotations

import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mft.errors import UserError, check_ranges, nearest, ranged

if TYPE_CHECKING:
    import torch

    Named = Iterable[tuple[str, torch.nn.Parameter]]


def groups(named_parameters: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the trained parameters as a group with and one without weight decay, unless it is empty.

    Decay is for matrices, LoRA's A and B among them; norms and biases (one dimension) have none, since
    pulling them to 0 takes away what they are for. Raises UserError when nothing is trained.
    """
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise UserError("no parameter of the model is trained; check peft.targets, or what peft=full freezes")
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in trained:
        # Under ZeRO-3 a parameter is an empty placeholder here; ds_shape is its true shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) > 1 else vectors).append(parameter)
    both = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def _no_dtensors(chosen: str) -> UserError:
    # its kernels mix DTensors of parameters with plain states, and fail
    return UserError(
        f"{chosen}: bitsandbytes cannot update what dist=fsdp divides over ranks; choose optimizer=adamw, or "
        "dist=ddp"
    )


class Optimizer(ABC):
    """What conf/optimizer chooses. Subclasses are dataclasses of plain values."""

    lr: float | None

    def refuse_dtensors(self) -> None:
        """Raises UserError where it cannot update parameters that fsdp divides."""

    def base_lr(self, default_lr: float) -> float:
        """Returns the peak learning rate: `lr`, or what the peft mode suggests when it is null."""
        return default_lr if self.lr is None else self.lr

    @abstractmethod
    def build(self, named_parameters: Named, default_lr: float) -> torch.optim.Optimizer:
        """Returns the optimizer of the parameters that require a gradient. default_lr: where `lr` is null."""


class Library(Optimizer):
    """An optimizer of torch or bitsandbytes, named by its own class, with that class's arguments."""

    def __init__(self, kind: type[torch.optim.Optimizer], values: dict[str, Any]):
        self.kind, self.values = kind, dict(values)
        arguments = dict(inspect.signature(kind).parameters)
        del arguments["params"]
        for key in values:
            if key not in arguments:
                hint = f"{nearest(key, arguments) or '.'} Its arguments: {', '.join(arguments)}."
                raise UserError(f"optimizer.{key}: {kind.__name__} has no such argument{hint}")
        # these two are decided per run and per group, the others go to the constructor as they are
        self.lr = self.values.pop("lr", None)
        default = arguments["weight_decay"].default if "weight_decay" in arguments else 0.0
        self.weight_decay = self.values.pop("weight_decay", default)

    def refuse_dtensors(self) -> None:
        if self.kind.__module__.partition(".")[0] == "bitsandbytes":
            raise _no_dtensors(f"optimizer._target_={self.kind.__module__}.{self.kind.__name__}")

    def check(self) -> None:
        """Raises UserError for values that the optimizer itself refuses."""
        import torch

        # one weight is enough: constructors judge their arguments, not the parameters
        self.build([("weight", torch.nn.Parameter(torch.zeros(1, 1)))], 1e-4)

    def build(self, named_parameters: Named, default_lr: float) -> torch.optim.Optimizer:
        parameters = groups(named_parameters, self.weight_decay)
        try:
            return self.kind(parameters, **{"lr": self.base_lr(default_lr), **self.values})
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer: {self.kind.__name__} refuses its arguments: {error}") from error


@dataclass
class Adam(Optimizer):
    """The fields both optimizers have; raises UserError for values no Adam can run with."""

    lr: float | None = ranged(None, above=0)
    """Peak learning rate; null: the default of the peft mode."""
    beta1: float = ranged(0.9, min=0, below=1)
    """Decay of the mean of the gradients."""
    beta2: float = ranged(0.999, min=0, below=1)
    """Decay of the mean of their squares; 0.95 forgets outliers sooner."""
    eps: float = ranged(1e-8, min=0)
    """Added to the root of the mean square, in units of the gradient."""
    weight_decay: float = ranged(0.0, min=0)
    """Part of a matrix taken away per unit of learning rate and step; norms and biases have none."""

    def __post_init__(self) -> None:
        check_ranges(self, "optimizer")

    def arguments(self, default_lr: float) -> dict[str, Any]:
        return {"lr": self.base_lr(default_lr), "betas": (self.beta1, self.beta2), "eps": self.eps}


@dataclass
class AdamW(Adam):
    """torch.optim.AdamW."""

    public_name: ClassVar[str] = "adamw"

    fused: bool = True
    """One kernel for all parameters; false for a device that lacks it."""

    def build(self, named_parameters: Named, default_lr: float) -> torch.optim.Optimizer:
        import torch

        parameters = groups(named_parameters, self.weight_decay)
        return torch.optim.AdamW(parameters, **self.arguments(default_lr), fused=self.fused)


@dataclass
class AdamW8bit(Adam):
    """bitsandbytes.optim.AdamW8bit (Dettmers et al. 2022): states in blocks of 8 bits.

    Tensors below 4,096 values keep 32 bits.
    """

    public_name: ClassVar[str] = "adamw8bit"

    def refuse_dtensors(self) -> None:
        raise _no_dtensors("optimizer=adamw8bit")

    def check(self) -> None:
        """Raises UserError where bitsandbytes is not installed; whether it loads is known on a rank only."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("optimizer=adamw8bit: bitsandbytes is not installed; use optimizer=adamw")

    def build(self, named_parameters: Named, default_lr: float) -> torch.optim.Optimizer:
        """Also raises UserError when bitsandbytes cannot be loaded on this machine."""
        try:
            from bitsandbytes.optim import AdamW8bit as Optimizer
        # OSError, RuntimeError: a library of CUDA that is missing or of another version
        except (ImportError, OSError, RuntimeError) as error:
            reason = f"bitsandbytes cannot be loaded here ({error})"
            raise UserError(f"optimizer=adamw8bit: {reason}; use optimizer=adamw") from error
        return Optimizer(groups(named_parameters, self.weight_decay), **self.arguments(default_lr))
