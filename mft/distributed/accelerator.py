"""Building the `Accelerator` that every engine wraps, from conf/dist and `train.precision` alone."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from mft.errors import UserError
from mft.hardware import visible_gpus

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import KwargsHandler

PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}
"""`train.precision` -> accelerate's mixed_precision."""

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher (torchrun, elastic's agent, srun by way of `placement`) tells a rank."""


def accelerator(precision: str, cpu: bool | None, *handlers: KwargsHandler) -> Accelerator:
    """Builds the Accelerator that every engine wraps: conf/dist is its only source, not the environment.

    Raises UserError for a precision that the device lacks, and for a GPU that torch cannot use: the config
    was resolved for it, and a CPU would take its place.
    """
    import torch
    from accelerate import Accelerator

    if cpu is None and not torch.cuda.is_available() and visible_gpus():
        raise UserError(
            f"the driver shows a GPU, but torch {torch.__version__} cannot use it; update the driver, "
            "install a torch for its CUDA, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU"
        )
    # cpu=False on a machine without GPU would be no distribution at all
    cpu = not torch.cuda.is_available() if cpu is None else cpu
    refuse_fp16(precision, cpu)
    if not cpu and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("train.precision=bf16 is not supported by this GPU; choose fp16 or fp32")
    forget_foreign_settings()
    return Accelerator(mixed_precision=PRECISIONS[precision], cpu=cpu, kwargs_handlers=list(handlers))


def refuse_fp16(precision: str, cpu: bool) -> None:
    """Raises UserError for fp16 on a CPU."""
    if cpu and precision == "fp16":
        raise UserError("train.precision=fp16 needs a GPU; on the CPU choose bf16 or fp32")


def forget_foreign_settings() -> None:
    """Removes accelerate's settings from the environment, since conf/dist decides; warns of them once."""
    foreign = sorted(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")))
    foreign = [name for name in foreign if name != "ACCELERATE_DEBUG_MODE"]
    for name in foreign:
        del os.environ[name]
    if foreign:
        listed = ", ".join(foreign)
        warnings.warn(f"ignored environment variables, since conf/dist decides: {listed}", stacklevel=2)
