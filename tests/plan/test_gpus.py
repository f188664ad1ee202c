"""Names and sizes of GPUs."""

from __future__ import annotations

import pytest

from mft.errors import UserError
from mft.hardware import Gpu, machine_memory
from mft.plan import gpus
from mft.plan.gpus import COMMON, GIB, device, devices, host_memory


@pytest.mark.parametrize(
    ("text", "name", "count", "gib"),
    [
        ("H100", "H100", None, 79.1),
        ("h200", "H200", None, 139.8),
        ("8xA100-40", "A100-40", 8, 39.4),
        ("4 x a100_80", "A100-80", 4, 79.1),
        ("RTX 4090", "4090", None, 23.5),
        ("NVIDIA L40S", "L40S", None, 44.4),
        ("80GiB", "80GiB", None, 80),
        ("2x24gb", "24GiB", 2, 24),
        ("23.5 GiB", "23.5GiB", None, 23.5),
        ("A100-80GB", "A100-80", None, 79.1),
        ("NVIDIA H100 80GB HBM3", "H100", None, 79.1),
        ("h100 pcie", "H100-PCIE", None, 79.1),
        ("NVIDIA RTX 6000 Ada Generation", "6000-ADA", None, 47.4),
        ("H100 MIG 3g.40gb", "H100-3g.40gb", None, 38.0),
        ("A100-1g.5gb", "A100-40-1g.5gb", None, 4.75),
    ],
)
def test_names_and_sizes_are_read_as_people_write_them(
    text: str, name: str, count: int | None, gib: float
) -> None:
    found = device(text)
    assert (found.name, found.count, found.memory) == (name, count, gib * GIB)
    assert found.kind == "cuda"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("H10O", "plan.gpu=H10O: unknown GPU; did you mean H100? Allowed: T4,"),
        ("A100", "plan.gpu=A100: it is made with several sizes of memory; choose A100-40 or A100-80."),
        ("80", "plan.gpu=80: unknown GPU; did you mean 80GiB?"),
        ("0xH100", "plan.gpu=0xH100: a machine has 1 to 1,024 of them."),
        ("2xcpu", "plan.gpu=2xcpu: a machine has one; launch.nproc"),
        ("H100-40", "plan.gpu=H100-40: unknown GPU;"),
        ("A100-3g.200gb", "plan.gpu=A100-3g.200gb: unknown GPU;"),
        ("4090 Laptop", "plan.gpu=4090 Laptop: unknown GPU"),
        ("0GiB", "plan.gpu=0GiB: 1 GiB to 1,048,576 GiB can be planned for."),
        ("", "plan.gpu=: unknown GPU."),
    ],
)
def test_what_is_no_gpu_is_refused_with_the_nearest_name(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        device(text)
    assert str(caught.value).startswith(words)


def test_several_are_separated_by_commas_or_given_again_and_count_once() -> None:
    assert [d.shown for d in devices(["[H100,4090]", "8xH100", "H100"])] == ["H100", "4090", "8 x H100"]


def test_a_cpu_is_this_machine() -> None:
    found = device("cpu")
    assert found.kind == "cpu" and found.memory == machine_memory()
    assert str(found.precision("fp32")) == "fp32"


def test_without_a_gpu_common_ones_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpus", lambda: ())
    assert [d.name for d in devices([])] == list(COMMON)


def test_visible_gpus_count_by_the_smallest_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver would show is given, since this machine may have no GPU."""
    small, large = ((40 * GIB, "NVIDIA A100-PCIE-40GB"), (80 * GIB, "NVIDIA A100-SXM4-80GB"))
    shown = [Gpu((8, 0), True, memory, name) for memory, name in (large, small)]
    monkeypatch.setattr(gpus, "gpus", lambda: tuple(shown))
    (found,) = devices([])
    assert (found.memory, found.shown, found.visible) == (40 * GIB, "2 x NVIDIA A100-PCIE-40GB", True)
    assert found.card is not None and found.card.tflops == 312


def test_gpus_without_bf16_compute_in_fp16() -> None:
    assert [str(device(name).precision("auto")) for name in ("T4", "V100-32", "H100")] == [
        "fp16",
        "fp16",
        "bf16",
    ]


def test_memory_of_a_host_is_a_size() -> None:
    assert host_memory("512GiB") == 512 * GIB
    with pytest.raises(UserError, match=r"plan.host=512: no size of memory; did you mean 512GiB\?"):
        host_memory("512")
