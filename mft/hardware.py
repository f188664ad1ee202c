"""What this machine has: GPUs, and whether it computes in bf16; and libraries that talk about what it lacks.

torch is imported only where there is a GPU.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Device files of a machine with NVIDIA or AMD GPUs."""

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of /proc/cpuinfo (x86, x86, Arm). A CPU without them emulates bf16, 7 times slower than fp32 with
AVX2."""


def quiet_without_gpu() -> None:
    """Keeps libraries, while they are imported, from warning of what they could use on another machine."""
    # of a package with CPU kernels
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not any(path.exists() for path in DRIVERS):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed says that it found nothing better


def quiet_libraries() -> None:
    """Silences what libraries print on every start and a person can do nothing about; errors stay."""
    quiet_without_gpu()
    import transformers

    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\."
    )
    transformers.utils.logging.disable_progress_bar()


def visible_gpus() -> int:
    """Returns the number of GPUs that CUDA would show; CUDA_VISIBLE_DEVICES counts."""
    if not any(path.exists() for path in DRIVERS) or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    import torch

    return torch.cuda.device_count()


def computes_in_bf16() -> bool:
    """Whether the GPUs, or without any the CPU, have bf16 arithmetic of their own."""
    if visible_gpus():
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return bool(BF16_FLAGS & set(text.split("\n\n", 1)[0].split()))
