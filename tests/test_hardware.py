"""What GPUs a process may use, where none is here: a library compiled in the test stands in for CUDA's
driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mft import hardware
from mft.config.schema import resolve_precision
from mft.hardware import control_group
from mft.launch.placement import ranks

DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) {  /* two whole GPUs, of which one is cut into slices */
    char *seen = getenv("CUDA_VISIBLE_DEVICES");
    *count = seen ? *seen != 0 : 2;
    for (; seen && *seen; seen++) *count += *seen == ',';
    return 0;
}
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 76 ? 0 : atoi(getenv(attribute == 75 ? "GENERATION" : "MAPS_MEMORY"));
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)(80 - device) << 30; return 0; }
int cuDeviceGetName(char *name, int room, int device) {
    strncpy(name, "NVIDIA A100-SXM4-80GB", room);
    return 0;
}
"""
MIG = "MIG-4a3c1c2e-0000-5b2a-9b1c-000000000001"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not (compiler := shutil.which("cc")):
        pytest.skip("no compiler is here")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True, timeout=120
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("GENERATION", "9")
    monkeypatch.setenv("MAPS_MEMORY", "1")
    for name in ("CUDA_VISIBLE_DEVICES", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "DRIVERS", (tmp_path,))
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # of the build, which is for CPUs here
    hardware._shown_by_driver.cache_clear()
    yield
    hardware._shown_by_driver.cache_clear()


@pytest.mark.parametrize(
    ("variable", "found"),
    [(None, 2), ("", 0), ("-1", 0), ("0,1", 2), ("3", 1), ("GPU-a,GPU-b,GPU-c", 3), (MIG, 1)],
)
def test_auto_takes_the_gpus_that_cuda_shows(
    driver: None, monkeypatch: pytest.MonkeyPatch, variable: str | None, found: int
) -> None:
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert hardware.visible_gpus() == found
    assert ranks("auto") == max(1, found)


@pytest.mark.parametrize(("generation", "precision"), [("9", "bf16"), ("7", "fp16")])
def test_precision_is_known_without_starting_cuda(
    driver: None, monkeypatch: pytest.MonkeyPatch, generation: str, precision: str
) -> None:
    """A process that starts CUDA can fork no rank that uses a GPU."""

    def started(*_: object) -> None:
        raise AssertionError("CUDA was started")

    for name in ("device_count", "is_bf16_supported", "current_device", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, started)
    monkeypatch.setenv("GENERATION", generation)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", MIG)
    assert resolve_precision("auto") == precision
    assert hardware.visible_gpus() == 1


def test_a_cpu_build_of_torch_uses_no_gpu(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert hardware.visible_gpus() == 0


def test_a_driver_that_fails_shows_no_gpu(driver: None, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    assert hardware.visible_gpus() == 0


@pytest.mark.parametrize("cuda", [True, False])
def test_a_gpu_of_wsl2_counts_where_a_library_of_its_maker_is(
    driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool
) -> None:
    """Every GPU there has the same device file, for which a folder stands here."""
    code = f"from pathlib import Path; from mft import hardware; hardware.WSL2 = Path({str(tmp_path)!r}); "
    code += "hardware.DRIVERS = (); hardware.growing_segments(); print(hardware.has_gpu())"
    if not cuda:
        monkeypatch.delenv("LD_LIBRARY_PATH")
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert told.stdout.strip() == str(cuda)
    if not cuda:
        monkeypatch.setattr(hardware, "DRIVERS", ())
        monkeypatch.setattr(hardware, "WSL2", tmp_path)
        monkeypatch.setattr(hardware, "ROCM", tmp_path)
        assert hardware.has_gpu()  # an AMD GPU with ROCm


GROWING = "expandable_segments:True"


@pytest.mark.parametrize(
    ("given", "torch_version", "expected"),
    [
        ({}, "2.13.0+cu130", {"PYTORCH_ALLOC_CONF": GROWING}),
        ({}, "2.11.0", {"PYTORCH_ALLOC_CONF": GROWING}),
        ({}, "2.9.1+cu128", {"PYTORCH_CUDA_ALLOC_CONF": GROWING}),
        ({"MAPS_MEMORY": "0"}, "2.13.0", {}),
        ({"CUDA_VISIBLE_DEVICES": ""}, "2.13.0", {}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "2.13.0", None),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "2.13.0", None),
    ],
)
def test_the_allocator_grows_its_segments_where_the_gpu_can_and_the_person_said_nothing(
    driver: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    torch_version: str,
    expected: dict[str, str] | None,
) -> None:
    for name in hardware.ALLOCATOR:
        monkeypatch.setenv(name, "")  # what is set below is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hardware, "version", lambda package: torch_version)

    def set_now() -> dict[str, str]:
        return {name: os.environ[name] for name in hardware.ALLOCATOR if name in os.environ}

    before = set_now()
    monkeypatch.setattr(hardware, "NVIDIA", tmp_path / "none")
    hardware.growing_segments()  # a GPU of another maker, or none
    assert set_now() == before
    monkeypatch.setattr(hardware, "NVIDIA", tmp_path)
    hardware.growing_segments()
    assert set_now() == (before if expected is None else expected)


def test_the_allocator_is_set_before_torch_is_imported() -> None:
    code = "import sys, mft.launch.worker; print('torch' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert told.stdout.strip() == "False"


def test_the_limit_of_a_control_group_is_that_of_the_nearest_one(tmp_path: Path) -> None:
    assert control_group("memory.max", tmp_path) == ""
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert control_group("memory.max", tmp_path) == "1073741824"
