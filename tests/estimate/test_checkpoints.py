"""What checkpoints need of the disk, in words."""

from __future__ import annotations

from pathlib import Path

from mft.estimate import checkpoints


def test_checkpoints_beside_the_free_space(tmp_path: Path) -> None:
    few = checkpoints.words(2**20, 2**20, 3, 10, tmp_path / "not" / "there")
    assert few.startswith("1 MiB each, 4 kept at most: 4 MiB") and "too little" not in few
    assert "10 kept at most" in checkpoints.words(2**50, 2**50, None, 10, tmp_path)
    assert "too little: set train.keep" in checkpoints.words(2**50, 2**50, None, 10, tmp_path)
