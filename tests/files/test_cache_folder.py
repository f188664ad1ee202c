"""Folders of the cache: where they lie, and that each is made once, completely or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mft.files.cache_folder import default_cache_dir, made_once


def test_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MFT_CACHE", str(tmp_path))
    assert default_cache_dir() == str(tmp_path)
    monkeypatch.delenv("MFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == str(tmp_path / "xdg" / "mft")


def test_all_who_ask_get_the_folder_that_one_of_them_made(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("complete")

    threads = [threading.Thread(target=made_once, args=(tmp_path / "cache" / "a", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 1 and (tmp_path / "cache" / "a" / "file").read_text() == "complete"


def test_what_fails_leaves_nothing_and_what_was_killed_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.1.tmp").mkdir()

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "a", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert list(made_once(tmp_path / "a", lambda folder: None).iterdir()) == []
