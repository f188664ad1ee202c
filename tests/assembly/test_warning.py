"""The warning before a model is loaded that will hardly fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mft.assembly import warning
from mft.assembly.warning import shortage_of, surely_fits
from mft.estimate.memory import USABLE
from mft.plan.case import Case, case, composed
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
