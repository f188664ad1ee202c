"""Folders that a run writes to: whether they can be written, free space, and the clock of their disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from mft.doctor.finding import Finding, Part, State
from mft.doctor.needs import Needs
from mft.files.disk import free_bytes, nearest_folder

GIB = 2**30
LEAST = 2 * GIB
"""Free bytes below which a run of any size soon has no room for its checkpoints."""
SHARED_LEAST = GIB
"""Bytes of /dev/shm, through which NCCL and gloo pass tensors between the ranks of a machine."""
SKEW = 2.0
"""Seconds by which two clocks may differ before times of files mislead."""

part = Part("places")


def findings(cfg: DictConfig | None, needs: Needs) -> Iterator[Finding]:
    """Yields a line for each folder; cfg: a composed config, None for the folders that are no setting; needs:
    what it needs."""
    if cfg is not None:
        yield of_folder("output_dir", Path(cfg.output_dir), "output_dir=…")
        yield of_folder("cache_dir", Path(cfg.cache_dir), "cache_dir=… or MFT_CACHE")
    cache = of_folder("hub cache", hub_cache(), "HF_HOME")
    # One that several people share is often read-only, and a model in a folder needs none.
    yield cache if needs.of("hub") or cache.state is State.ok else replace(cache, state=State.note)
    yield of_folder("temporary files", Path(tempfile.gettempdir()), "TMPDIR")
    yield shared_memory(Path("/dev/shm"))


def hub_cache() -> Path:
    """Returns the folder in which models and data sets of the hub are kept."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def of_folder(name: str, folder: Path, setting: str) -> Finding:
    """Returns whether a folder, or the nearest one above it that is there, can be written, by writing.

    setting: what decides it. The folder itself is not made.
    """
    there = nearest_folder(folder)
    cure = f"choose another folder: {setting}"
    try:
        before = time.time()
        with tempfile.NamedTemporaryFile(dir=there, prefix=".mft-doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
            skew = os.stat(file.name).st_mtime - before
    except OSError as error:
        return part.problem(name, f"{folder}: cannot be written: {error.strerror}", cure)
    free = free_bytes(there)
    found = f"{folder}: {free / GIB:,.1f} GiB free"
    if free < LEAST:
        return part.problem(name, found, f"make room, or {cure}")
    if abs(skew) > SKEW:
        found += f"; its clock is {abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
        return part.note(
            name, found, "set both clocks by NTP: resuming and `mft runs` compare times of files"
        )
    return part.ok(name, found)


def shared_memory(folder: Path) -> Finding:
    """Returns whether the ranks of this machine have memory to share."""
    try:
        size = shutil.disk_usage(folder)
    except OSError:
        return part.note("shared memory", f"{folder} is not there; NCCL then uses slower ways")
    found = f"{folder}: {size.free / GIB:,.1f} of {size.total / GIB:,.1f} GiB free"
    if size.free >= SHARED_LEAST:
        return part.ok("shared memory", found)
    cure = "give the container more, e.g. docker run --shm-size=8g"
    return part.note("shared memory", f"{found}; several ranks on GPUs need more", cure)
