"""What the machine is, and whether bitsandbytes packs the same bits on its GPU and its CPU (A0)."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.gpu.children import Cell, Found, Place

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "flash-attn",
    "matplotlib",
)
ASKED = "name,driver_version,power.limit,clocks.sm,clocks.max.sm,temperature.gpu,mig.mode.current"
"""What nvidia-smi is asked for."""


def facts(place: Place) -> dict[str, Any]:
    """Returns what was installed, and the GPU."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        found["commit"] = commit.stdout.strip()
    if place.device == "cuda":
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        found["nvidia-smi"] = told.stdout.strip()
        found |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
        found["float32 products"] = torch.get_float32_matmul_precision()  # highest: without TF32
        found |= {"nccl": torch.cuda.nccl.version(), "gpus": torch.cuda.device_count()}
    return found


def machine(place: Place) -> Found:
    """Tells what there is."""
    return Found(facts(place))


def packing(place: Place) -> Found:
    """bitsandbytes packs a matrix to the same 4 bits on the GPU as on the CPU."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    packed, real = [], []
    for device in ("cpu", place.device):
        bits, state = bnb.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
        packed.append(bits.cpu().flatten())
        real.append(bnb.dequantize_4bit(bits, state).float().cpu())
    found = Found({"other bytes": float((packed[0] != packed[1]).float().mean())})
    found.values["real values"] = float((real[0] - real[1]).norm() / real[0].norm())
    found.below({"other bytes": 1e-3, "real values": 1e-3})
    return found


CELLS = [Cell("A0 machine", machine, 30, "quick"), Cell("A0 packing", packing, 30, "quick")]
