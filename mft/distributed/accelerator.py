"""Building the `Accelerator` that every engine wraps, from conf/dist and `train.precision` alone."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}
"""`train.precision` -> accelerate's mixed_precision."""


def accelerator(precision: str, cpu: bool | None, *handlers: Any, **options: Any) -> Accelerator:
    """Builds the Accelerator that every engine wraps: conf/dist is its only source, not the environment."""
    import torch
    from accelerate import Accelerator

    precision = getattr(precision, "value", precision)
    if precision not in PRECISIONS:
        raise UserError(
            f"train.precision={precision}: choose one of "
            f"{', '.join(PRECISIONS)}{nearest(precision, PRECISIONS)}"
        )
    if cpu is None:
        # cpu=False on a machine without GPU would be no distribution at all
        cpu = not torch.cuda.is_available()
    refuse_fp16(precision, cpu)
    if not cpu and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("train.precision=bf16 is not supported by this GPU; choose fp16 or fp32")
    forget_foreign_settings()
    return Accelerator(
        mixed_precision=PRECISIONS[precision], cpu=cpu, kwargs_handlers=list(handlers), **options
    )


def refuse_fp16(precision: str, cpu: bool) -> None:
    """Raises UserError for fp16 on a CPU."""
    if cpu and precision == "fp16":
        raise UserError("train.precision=fp16 needs a GPU; on the CPU choose bf16 or fp32")


def grouped(precision: str, cpu: bool | None, *handlers: Any) -> tuple[Accelerator, bool]:
    """Returns the Accelerator of this rank inside a process group, and whether the group was made here.

    Ranks are read from the environment (RANK, WORLD_SIZE, ...); without them this is a group of one.
    """
    import torch

    alone: dict[str, str | None] = {}
    if "WORLD_SIZE" not in os.environ:
        ours = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        alone = {name: str(value) for name, value in ours.items()}
        alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    owns_group = not torch.distributed.is_initialized()
    with environment(alone):
        return accelerator(precision, cpu, *handlers), owns_group


def forget_foreign_settings() -> None:
    """Removes accelerate's own settings from the environment, with one warning: they would overrule
    conf/dist."""
    foreign = [
        name
        for name in sorted(os.environ)
        if name.startswith(("ACCELERATE_", "FSDP_")) and name != "ACCELERATE_DEBUG_MODE"
    ]
    for name in foreign:
        del os.environ[name]
    if foreign:
        warnings.warn(
            f"ignored environment variables, since conf/dist decides: {', '.join(foreign)}", stacklevel=2
        )


@contextmanager
def environment(values: dict[str, str | None]) -> Iterator[None]:
    """Sets (None: removes) environment variables for the duration of the block."""
    before = {name: os.environ.get(name) for name in values}
    _assign(values)
    try:
        yield
    finally:
        _assign(before)


def _assign(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def free_port() -> int:
    """Returns a TCP port that is free on 127.0.0.1 at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
