from __future__ import annotations

import os

import pytest


@pytest.fixture
def not_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the variables away that torchrun or srun set."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")):
            monkeypatch.delenv(name)
