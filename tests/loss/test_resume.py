"""A run that was interrupted goes on to the bit, whatever the loss mode remembers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mft.hardware import quiet_libraries
from mft.model.peft.lora import Lora
from mft.training.checkpoint import newest, restore
from mft.training.loop import fit
from tests.loss.loop import Layout, Recorder, Stage, write_tasks
from tests.loss.modes import MODES, made

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("resume")
    write_tasks(root / "tasks")
    quiet_libraries()
    stage = Stage(root, Layout(2, packed=False, backend="single"))
    stage.settings.eval_at_start, stage.settings.eval_every, stage.settings.eval_samples = True, 2, 3
    yield stage
    stage.engine.close()


def run(stage: Stage, mode: str, folder: Path, stop_after: int = STEPS) -> tuple[dict, torch.Tensor]:
    """Trains adapters with dropout, from the newest checkpoint in `folder` where there is one, and saves at
    the end."""
    recorder = Recorder()
    t = stage.training(made(mode), recorder, STEPS, Lora(dropout=0.1), folder)
    t.stop_requested = lambda: t.state.step + 1 >= stop_after
    torch.manual_seed(5)
    if checkpoint := newest(folder):
        torch.manual_seed(6)
        restore(checkpoint, t.state, t.engine, t.loss)
    assert fit(t) == ("finished" if stop_after > STEPS else "stopped")
    return recorder.rows, stage.parameters(t)


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_twice_is_uninterrupted(stage: Stage, mode: str, tmp_path: Path) -> None:
    whole, parameters = run(stage, mode, tmp_path / "whole", STEPS + 1)
    # after step 4 a validation is due: a run that is asked to stop leaves it to the one that goes on
    parts = [run(stage, mode, tmp_path / "parts", stop_after) for stop_after in (1, 4, STEPS + 1)]
    joined: dict[int, dict[str, float]] = {}
    for rows, _ in parts:
        for step, values in rows.items():
            joined.setdefault(step, {}).update(values)
    clock = ("speed/", "memory/")
    assert joined.keys() == whole.keys()
    for step, values in whole.items():
        for name, value in values.items():
            if not name.startswith(clock):
                assert joined[step][name] == value, (step, name)
    assert torch.equal(parts[-1][1], parameters)
