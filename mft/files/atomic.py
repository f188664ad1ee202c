"""Files and folders that are complete or absent even after a kill: written under another name, then
renamed."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


def write_text(path: Path, text: str, durable: bool = False, temporary: Path | None = None) -> None:
    """Writes a text file in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode(), durable, temporary)


def write_bytes(path: Path, content: bytes, durable: bool = False, temporary: Path | None = None) -> None:
    """Writes a file; its folder is made where it is not there.

    durable: a power cut leaves the old file or the new one, never an empty one; temporary: what it is called
    while it is written, path.tmp by default.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)  # one step for readers: they see the old file or the new one
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def publish(temporary: Path, folder: Path) -> None:
    """Renames a completely written folder to its final name, replacing what was there."""
    if folder.exists():
        remove(folder)
    temporary.rename(folder)


def remove(folder: Path) -> None:
    """Renames a folder before removing it: a kill in the middle leaves no half that looks complete."""
    old = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)
