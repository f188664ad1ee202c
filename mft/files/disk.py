"""The disk of a folder that may not exist yet: its free space."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def nearest_folder(folder: Path) -> Path:
    """Returns a folder, or the nearest one above it that exists, also where its parents cannot be read."""
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))


def free_bytes(folder: Path) -> int:
    """Returns the bytes free on the disk of an existing folder; sys.maxsize where its file system does not
    tell, as some that stand before an object store."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else sys.maxsize
