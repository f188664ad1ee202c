"""GPUs and bf16 support of this machine, and silencing of library warnings about hardware it lacks.

Imports torch only on machines with a GPU.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from pathlib import Path

DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Device files of a machine with NVIDIA or AMD GPUs."""

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of /proc/cpuinfo (x86, x86, Arm). A CPU without them emulates bf16, 7 times slower than fp32 with
AVX2."""


def has_gpu() -> bool:
    """Whether this machine has a GPU with a driver; torch is not asked."""
    return any(path.exists() for path in DRIVERS)


def quiet_without_gpu() -> None:
    """Keeps libraries from warning on import about hardware that this machine lacks."""
    # it recommends a package with CPU kernels
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found no accelerator


def quiet_libraries() -> None:
    """Silences library messages that appear on every start and that users cannot act on; errors stay."""
    quiet_without_gpu()
    import transformers

    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\."
    )
    transformers.utils.logging.disable_progress_bar()


def visible_gpus() -> int:
    """Returns the number of GPUs that CUDA shows, honouring CUDA_VISIBLE_DEVICES."""
    if not has_gpu() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    import torch

    return torch.cuda.device_count()


def computes_in_bf16() -> bool:
    """Whether the GPUs, or the CPU if there are none, have native bf16 arithmetic."""
    if visible_gpus():
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_computes_in_bf16()


@functools.cache
def cpu_computes_in_bf16() -> bool:
    """Whether the CPU has native bf16 arithmetic."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return bool(BF16_FLAGS & set(text.split("\n\n", 1)[0].split()))
