"""Where caches lie unless cache_dir says otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> str:
    """Returns $MFT_CACHE, else `mft` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if os.environ.get("MFT_CACHE"):
        return os.path.abspath(os.environ["MFT_CACHE"])
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mft")
