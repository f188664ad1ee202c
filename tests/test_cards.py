"""GPUs by the names that drivers have for them."""

from __future__ import annotations

import pytest

from mft.cards import card_of, known


@pytest.mark.parametrize(
    ("driver", "name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80", 312),
        ("NVIDIA A100-PCIE-40GB", "A100-40", 312),
        ("NVIDIA H100 80GB HBM3", "H100", 989),
        ("NVIDIA H100 PCIe", "H100-PCIE", 756),
        ("NVIDIA H100 NVL", "H100-NVL", 835),
        ("NVIDIA H200", "H200", 989),
        ("NVIDIA GH200 480GB", "GH200", 989),
        ("NVIDIA L40", "L40", 181),
        ("NVIDIA L40S", "L40S", 362),
        ("NVIDIA L4", "L4", 121),
        ("NVIDIA A10", "A10", 125),
        ("NVIDIA A10G", "A10G", 70),
        ("NVIDIA GeForce RTX 4090", "4090", 165),
        ("Tesla V100-SXM2-32GB", "V100-32", 125),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "PRO-6000", 504),
    ],
)
def test_drivers_names_are_read(driver: str, name: str, tflops: float) -> None:
    found = known(driver, any_size=True)
    assert found is not None and (found[0], found[1].tflops) == (name, tflops)


@pytest.mark.parametrize("driver", ["NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", ""])
def test_another_gpu_is_not_taken_for_one_of_a_similar_name(driver: str) -> None:
    assert card_of(driver) is None


def test_a_slice_computes_its_part_of_the_whole() -> None:
    slice_, whole = card_of("NVIDIA A100-SXM4-40GB MIG 3g.20gb"), card_of("NVIDIA A100-SXM4-40GB")
    assert slice_ is not None and whole is not None
    assert slice_.tflops == pytest.approx(whole.tflops * 3 / 7)
