"""At which rate a step is computed: given, measured, or assumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mft.plan.case import Case, case, composed
from mft.plan.gpus import device
from mft.plan.rates import rate
from tests.plan.configs import config_alone


def of(tmp_path: Path, gpu: str) -> Case:
    model = config_alone(tmp_path / "model")
    out = tmp_path / "outputs" / "name" / "run"
    return case(composed([f"model.path={model}", "tracking=none", f"output_dir={out}"]), device(gpu))


def run(
    tmp_path: Path, name: str, device: str, flops_per_token: float, speeds: list[float], **row: float
) -> None:
    """Leaves what a run on two devices leaves of its speed."""
    folder = tmp_path / "outputs" / "earlier" / name
    folder.mkdir(parents=True)
    files = {
        "identity.json": {},
        "provenance.json": {"device": device, "ranks": "2"},
        "summary.json": {"tokens": 1000, "flops": 1000 * flops_per_token},
    }
    for file, values in files.items():
        (folder / file).write_text(json.dumps(values))
    rows = [{"step": i, "speed/tokens_per_second": speed} | row for i, speed in enumerate(speeds)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_given_rate_is_taken(tmp_path: Path) -> None:
    found = rate(of(tmp_path, "H100"), 250, 6e9)
    assert (found.tflops, found.words) == (250, "plan.tflops=250 a device")


def test_without_any_a_share_of_the_peak_is_assumed(tmp_path: Path) -> None:
    assert rate(of(tmp_path, "4090"), None, 6e9).words == "assumed: 40% of its 165 TFLOP/s"
    assert rate(of(tmp_path, "80GiB"), None, 6e9).words == "assumed: 40% of an A100-80's 312 TFLOP/s"
    assert rate(of(tmp_path, "cpu"), None, 6e9).words == ""


def test_of_the_runs_on_such_a_device_the_nearest_counts(tmp_path: Path) -> None:
    run(tmp_path, "small", "NVIDIA H100 80GB HBM3", 1e9, [1, 9e5])
    run(
        tmp_path,
        "near",
        "NVIDIA H100 80GB HBM3",
        5e9,
        [1, 80_000, 80_000],
        **{"speed/mfu": 0.3, "speed/hfu": 0.4},
    )
    run(tmp_path, "other", "NVIDIA A100-SXM4-80GB", 6e9, [1, 50_000])
    found = rate(of(tmp_path, "H100"), None, 6e9)
    # the first row holds the start; four thirds of the work, since layers were recomputed; on two devices
    assert found.tflops == pytest.approx(80_000 * 5e9 * 4 / 3 / 2 / 1e12)
    assert "a device, measured in" in found.words and found.words.endswith("earlier/near")
    assert rate(of(tmp_path, "L40S"), None, 6e9).words.startswith("assumed")
