"""GPUs, bf16 support and limits of this machine, what CUDA reads from the environment, copies to a device,
and silencing of library warnings about hardware that is not here.

Imports torch only on machines with a GPU.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
import warnings
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

NVIDIA = Path("/dev/nvidiactl")
"""Device file of a machine with NVIDIA GPUs, but not inside WSL2."""

DRIVERS = (NVIDIA, Path("/dev/kfd"))
"""That one, and that of AMD GPUs."""

WSL2 = Path("/dev/dxg")
"""Device file inside WSL2, of a GPU of any maker: the libraries beside it say whether torch can use it."""

ROCM = Path("/opt/rocm/lib/libhsa-runtime64.so.1")
"""AMD's library, which ROCm under WSL2 needs from the system."""

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of /proc/cpuinfo (x86, x86, Arm). A CPU without them emulates bf16, 7 times slower than fp32 with
AVX2."""

AMPERE = (8, 0)
"""Compute capability from which NVIDIA GPUs have bf16 arithmetic and the kernels of flash attention."""

CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Where control groups of version 2 are mounted."""

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables with settings of torch's CUDA allocator. Every version obeys the first, of which some warn that
it is deprecated."""

GENERAL_SINCE = (2, 11)
"""Version of torch from which the second is obeyed; 2.9 reads it and leaves segments as they are (pytorch
issue 183387), which costs more than a warning."""

ASK_CUDA = """
import ctypes, json
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
def ask(function, *given):
    value = ctypes.c_int()
    assert getattr(cuda, function)(ctypes.byref(value), *given) == 0
    return value.value
assert cuda.cuInit(0) == 0
found = []
for number in range(ask("cuDeviceGetCount")):
    device = ask("cuDeviceGet", number)
    found.append([ask("cuDeviceGetAttribute", attribute, device) for attribute in (75, 76, 102)])
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    assert cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device) == 0
    assert cuda.cuDeviceGetName(name, 256, device) == 0
    found[-1] += [memory.value, name.value.decode(errors="replace")]
print(json.dumps(found))
"""
"""Prints attributes, memory and name of each GPU that CUDA's driver shows, without torch (50 ms). 75, 76 and
102 of cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR and _VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED."""


class Gpu(NamedTuple):
    """A GPU that this process may use."""

    capability: tuple[int, int]
    """NVIDIA's compute capability; (0, 0) for an AMD GPU."""

    maps_memory: bool = False
    """Whether CUDA's driver says that memory can be mapped to addresses later; some virtual GPUs cannot."""

    memory: int = 0
    """Bytes."""

    name: str = ""
    """As its driver calls it."""


def has_gpu() -> bool:
    """Whether this machine has a GPU with a driver; torch is not asked."""
    return any(path.exists() for path in DRIVERS) or (WSL2.exists() and (ROCM.exists() or _has_cuda()))


@lru_cache
def _has_cuda() -> bool:
    """Whether the library of CUDA's driver is here; it is loaded and not started, so that ranks may fork."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def quiet_without_gpu() -> None:
    """Keeps libraries from warning on import about hardware that this machine lacks."""
    # it recommends a package with CPU kernels
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found no accelerator


def growing_segments() -> None:
    """Lets torch's CUDA allocator grow its segments, unless its variables are set; before torch is imported.

    Micro-batches differ in length, and segments of fixed sizes would fragment: memory runs out while enough
    of it is reserved. Not where a GPU cannot map memory later, and not inside WSL2: the first allocation
    would fail there (pytorch issue 192330).
    """
    if not NVIDIA.exists() or any(name in os.environ for name in ALLOCATOR):
        return
    found = _shown_by_driver(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if found and all(gpu.maps_memory for gpu in found):
        installed = tuple(int(part) for part in version("torch").split(".")[:2])
        os.environ[ALLOCATOR[installed >= GENERAL_SINCE]] = "expandable_segments:True"


def quiet_libraries() -> None:
    """Silences library messages that appear on every start and that users cannot act on; errors stay."""
    quiet_without_gpu()
    import transformers

    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\."
    )
    transformers.utils.logging.disable_progress_bar()


def gpus() -> tuple[Gpu, ...]:
    """Returns the GPUs that CUDA shows this process, honouring CUDA_VISIBLE_DEVICES.

    A child process asks the driver, since torch in this one would have to start CUDA, after which no forked
    rank could use a GPU: to see the slices of a MIG device (NVML counts whole GPUs), and for capabilities.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not has_gpu() or visible in ("", "-1"):
        return ()
    import torch

    if torch.version.hip or torch.cuda.is_initialized():
        shown = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        amd = torch.version.hip is not None
        return tuple(
            Gpu((0, 0) if amd else (gpu.major, gpu.minor), memory=gpu.total_memory, name=gpu.name)
            for gpu in shown
        )
    return _shown_by_driver(visible) if torch.version.cuda else ()


@lru_cache
def _shown_by_driver(visible: str | None) -> tuple[Gpu, ...]:
    """visible: CUDA_VISIBLE_DEVICES, for which the answer holds."""
    asked = subprocess.run([sys.executable, "-I", "-c", ASK_CUDA], capture_output=True, text=True)
    if asked.returncode:  # no driver, or one without a GPU: torch finds none either
        return ()
    return tuple(
        Gpu((major, minor), bool(maps), memory, name)
        for major, minor, maps, memory, name in json.loads(asked.stdout)
    )


def visible_gpus() -> int:
    """Returns the number of GPUs that CUDA shows, honouring CUDA_VISIBLE_DEVICES."""
    return len(gpus())


def computes_in_bf16() -> bool:
    """Whether the GPUs, or the CPU if there are none, have native bf16 arithmetic."""
    if found := gpus():
        import torch

        return torch.version.hip is not None or min(found).capability >= AMPERE
    return cpu_computes_in_bf16()


@lru_cache
def cpu_computes_in_bf16() -> bool:
    """Whether the CPU has native bf16 arithmetic."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return bool(BF16_FLAGS & set(text.split("\n\n", 1)[0].split()))


def machine_memory() -> int:
    """Returns the bytes of memory that the processes of this machine, or of its control group, may use."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = control_group("memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def control_group(name: str, root: Path = CONTROL_GROUPS) -> str:
    """Returns the first word of a file of this process's control group (version 2), or of the nearest one
    above it that has the file; "" where there is none.

    name: e.g. memory.max; root: where control groups are mounted.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own = next((line.rpartition(":")[2].lstrip("/") for line in lines if line.startswith("0::")), "")
    folder = root / own
    for place in (folder, *folder.parents):
        if place.is_relative_to(root) and (place / name).is_file():
            try:
                return (place / name).read_text(encoding="utf-8").strip()
            except OSError:
                return ""
    return ""


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Returns a tensor on `device`; the host does not wait for the copy."""
    # Only from pinned memory: other memory is copied by the driver, which may wait for the device first.
    if tensor.device.type == "cpu" and str(device).startswith("cuda"):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
