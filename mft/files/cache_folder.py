"""Folders of the cache: their default place, and making one exactly once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mft.errors import writable


def default_cache_dir() -> str:
    """Returns $MFT_CACHE, else `mft` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if os.environ.get("MFT_CACHE"):
        return os.path.abspath(os.environ["MFT_CACHE"])
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mft")


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns a folder of the cache, made under a lock if it is not there yet.

    make: fills an empty folder of another name, which is renamed when it is complete; its errors leave
    nothing behind. Several processes of a machine may ask at once: one makes the folder, the others wait.
    """
    from filelock import FileLock

    if folder.is_dir():
        return folder
    writable(folder.parent, "cache_dir")
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            for left in folder.parent.glob(f"{folder.name}.*.tmp"):  # by processes that were killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
            try:
                temporary.mkdir()
                make(temporary)
                temporary.rename(folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    return folder
