"""The warning before a model is loaded that will hardly fit."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mft.assembly import warning
from mft.assembly.warning import shortage_of, surely_fits, warn_of_memory
from mft.estimate.memory import USABLE
from mft.plan.case import Case, case, changed, composed
from mft.plan.gpus import GIB, device
from mft.plan.memory import PROCESS
from tests.plan.configs import config_alone
from tests.tiny_runs import train


@pytest.fixture
def planned(tmp_path: Path) -> Case:
    model = config_alone(tmp_path / "model", num_hidden_layers=2)
    given = [f"model.path={model}", "peft=full", "tracking=none", "data.seq_length=256"]
    return case(composed(given), device("H100"))


def test_too_little_memory_is_told_with_both_numbers(planned: Case) -> None:
    assert shortage_of(planned) == ""
    small = replace(planned, device=replace(planned.device, name="small", memory=3.0 * GIB))
    assert shortage_of(small).startswith("a rank needs about ") and shortage_of(small).endswith(
        " GiB of memory, and small has 1.7 GiB for it."
    )


def test_of_unequal_devices_the_smallest_is_told(planned: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with different GPUs are given by the test."""
    shown: list[str] = []
    ranks = [(80.0 * GIB, "large"), (3.0 * GIB, "small")]
    engine = SimpleNamespace(
        is_main=True, gather=lambda value: ranks if isinstance(value, tuple) else [value] * 2
    )
    run: Any = SimpleNamespace(engine=engine, folder=Path(), progress=SimpleNamespace(show=shown.append))
    monkeypatch.setattr(warning, "case_of", lambda r: planned)
    warn_of_memory(run)
    assert len(shown) == 1 and "and small has 1.7 GiB for it" in shown[0]


def test_a_host_without_room_for_what_is_offloaded_is_told(planned: Case) -> None:
    cfg = copy.deepcopy(planned.cfg)
    other = composed([f"model.path={planned.cfg.model.path}", "dist=zero3", "dist.offload_optimizer=true"])
    cfg.dist = other.dist
    of = changed(replace(planned, world=2), cfg)
    assert shortage_of(replace(of, host=500.0 * GIB)) == ""
    assert shortage_of(replace(of, host=4.0 * GIB)).startswith("2 ranks of a machine need about ")


def test_an_estimate_that_fails_ends_no_run(
    planned: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> None:
        raise KeyError("no such layer")

    monkeypatch.setattr(warning, "plan", failing)
    assert shortage_of(planned) == ""
    assert "memory is not estimated: KeyError" in caplog.text


def test_a_small_model_is_not_estimated(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = case(composed(["debug=fast", f"cache_dir={cache_dir}"]), device("H100"))
    assert surely_fits(tiny)
    assert not surely_fits(replace(tiny, device=replace(tiny.device, memory=1e6)))


@pytest.mark.slow
def test_a_run_warns_and_goes_on(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine with little memory is given by the test."""
    monkeypatch.setattr(warning, "machine_memory", lambda: int(PROCESS / USABLE))
    summary, _ = train(tmp_path, cache_dir)
    assert summary["status"] == "finished"
    text = capsys.readouterr().out
    assert "warning: a rank needs about" in text and "mft plan debug=fast" in text
