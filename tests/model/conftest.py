"""What the tests of models share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def converted_in_the_cache_of_this_session(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints in original formats are converted there, not into the user's cache."""
    monkeypatch.setenv("MFT_CACHE", str(cache_dir))
