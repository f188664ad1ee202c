"""Sizes and checksums of the files in a folder, written last: they prove that a folder is complete.

A checkpoint has them in COMPLETE, a model folder (`final/`, merged, converted) in mft_checksums.json. Folders
of earlier versions and of other programs have none; those are accepted.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import xxhash

from mft.errors import UserError
from mft.files.atomic import write_text

COMPLETE = "COMPLETE"
"""Marker of a checkpoint; a folder without it is never read."""
MODEL = "mft_checksums.json"
"""Marker of a model folder."""
WITHOUT_SUMS = "all files of this checkpoint are written\n"
"""COMPLETE as earlier versions wrote it."""
PROSE = ("README.md",)
"""Files that no program reads and people edit."""
SMALL = 16 << 20
"""Bytes of a file that is read in no time, in 2 ms."""

Sums = Mapping[str, tuple[int, str]]
"""Of each file, by its path in the folder: bytes and xxh3-128."""


def measure(folder: Path, files: Iterable[Path]) -> Sums:
    """Puts files of a folder onto the disk and returns their sizes and checksums.

    Without the flush a power cut could leave a name or a marker over missing data.
    """
    sums = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sums[path.relative_to(folder).as_posix()] = path.stat().st_size, digest(path)
    return sums


def seal(folder: Path, marker: str = MODEL, sums: Sums | None = None) -> None:
    """Writes the marker of a complete folder, atomically, and gives its files the mode of any new file.

    sums: of all files, where they were measured already.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != marker)
    entries = {name: list(entry) for name, entry in sorted((sums or measure(folder, files)).items())}
    follow_umask(files)
    text = json.dumps({"files": entries, "sum": _sum_of(entries)}, indent=1)
    write_text(folder / marker, text, durable=True, temporary=folder / f".{marker}.tmp")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the marker's name, which belongs to the folder and not to the file
    finally:
        os.close(descriptor)


def listed(folder: Path, marker: str = MODEL) -> Sums:
    """Returns what a folder's marker lists, {} for one of an earlier version and for one that is damaged."""
    return _read(folder / marker)[0] or {}


def damage(folder: Path, marker: str = MODEL, part: tuple[int, int] = (0, 1), hashed: bool = True) -> str:
    """Returns the first file of a folder that is not as its marker says, with what is expected; "" when it is
    sound.

    part: (rank, world) looks at this rank's share of the files; hashed False: looks at sizes alone, in no
    time.
    """
    sums, problem = _read(folder / marker)
    if sums is None:
        return problem or (_unreadable(folder) if hashed and part[0] == 0 else "")
    # Dealt to the ranks in order of size, so that each reads about as many bytes.
    by_size = sorted(sums.keys() - set(PROSE), key=lambda name: (-sums[name][0], name))
    return _first(folder, sums, by_size[part[0] :: part[1]], limit=math.inf if hashed else -1)


def require_sound(folder: Path, small_only: bool = False) -> None:
    """Raises UserError for a model or adapter folder with a damaged file; one without a marker is taken as it
    is.

    Of a checkpoint only the model is looked at, not what a resume needs besides. README.md may have been
    edited. small_only: of files above SMALL only the size is compared, so that it takes no time.
    """
    marker = MODEL if (folder / MODEL).exists() else COMPLETE
    sums, problem = _read(folder / marker) if (folder / marker).exists() else (None, "")
    used = [name for name in sums or () if "/" not in name and name not in PROSE]
    problem = problem or _first(folder, sums or {}, used, limit=SMALL if small_only else math.inf)
    if problem:
        raise UserError(
            f"{folder} is damaged: {problem}. Copy it again, or use another checkpoint of its run; if the "
            f"change was made on purpose, remove {folder / marker}."
        )


def digest(path: Path, size: int | None = None) -> str:
    """Returns the xxh3-128 of a file's first `size` bytes, by default of all."""
    hasher = xxhash.xxh3_128()
    buffer = bytearray(1 << 18)  # fits into the processor's cache: 7 GB/s, as fast as mapped pages
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        while left > 0 and (count := file.readinto(view[:left])):
            hasher.update(view[:count])
            left -= count
    return hasher.hexdigest()


def follow_umask(files: Iterable[Path]) -> None:
    """Gives files of one folder the mode that a new file there gets: safetensors lets the owner alone read
    its own."""
    files = list(files)
    if not files:
        return
    probe = files[0].with_name(f".{os.getpid()}.mode.tmp")  # os.umask cannot be read without being changed
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in files:
        with suppress(PermissionError):  # of another user, as a rank on another machine may be
            path.chmod(mode)


def _sum_of(entries: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(entries, sort_keys=True).encode())


def _read(marker: Path) -> tuple[Sums | None, str]:
    """Returns what a marker says, or None for one of an earlier version; and what is wrong with it, or ""."""
    try:
        text = marker.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return None, f"{marker.name} cannot be read ({getattr(error, 'strerror', None) or 'not text'})"
    if text == WITHOUT_SUMS:
        return None, ""
    try:
        values = json.loads(text)
        entries = values["files"]
        if values["sum"] == _sum_of(entries):
            return {name: (size, expected) for name, (size, expected) in entries.items()}, ""
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # JSON, but not what `seal` writes
    return None, f"{marker.name} is {'damaged' if text else 'empty'}"


def _first(folder: Path, sums: Sums, names: Iterable[str], limit: float) -> str:
    """Returns what is wrong with the first damaged file; above the limit: by its size
    alone."""
    for name in names:
        size, expected = sums[name]
        try:
            actual_size = (folder / name).stat().st_size
            if actual_size != size:
                return f"{name} has {actual_size:,} bytes, expected {size:,}"
            if size <= limit and (actual := digest(folder / name)) != expected:
                return f"{name} has the checksum {actual}, expected {expected}"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def _unreadable(folder: Path) -> str:
    """Returns the first file of a checkpoint without checksums that is cut short or is not what its name
    says."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".pt":
                with zipfile.ZipFile(path) as parts:
                    if parts.testzip() is not None:
                        return f"{name} is damaged"
            elif path.suffix == ".safetensors":
                # compares the size of the file with its header, and refuses gaps and unknown dtypes
                with safe_open(path, framework="numpy"):
                    pass
        except OSError as error:  # those of safetensors have no strerror
            return f"{name} cannot be read: {error.strerror or error}"
        except (ValueError, RecursionError, zipfile.BadZipFile, SafetensorError):
            return f"{name} is damaged"
    return ""
