"""Kinds of faults: disks that are full and folders that cannot be written to.

A full disk is a small tmpfs mounted over the run folder or the cache, which needs root. For root permissions
mean nothing, so the commands of a read-only folder give up that privilege first.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from pathlib import Path

from benchmarks.faults import moments
from benchmarks.faults.case import Case
from benchmarks.faults.damages import files

FULL = r"disk is full|No space left|[Mm]ake room|bytes free"
DENIED = r"[Pp]ermission|cannot be (made|written)"
ROOMY = 200 << 20
"""Bytes of a disk with enough room."""


@functools.cache
def mountable() -> bool:
    """Whether this process may mount a tmpfs."""
    if os.geteuid():
        return False
    probe = Path("/tmp", f"mft-faults-mount-{os.getpid()}")
    probe.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True).returncode == 0
    if mounted:
        unmount(probe)
    probe.rmdir()
    return mounted


def unmount(place: Path) -> None:
    """Unmounts a disk of a case, also one that is in use."""
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def full_from_the_start(case: Case) -> None:
    """A disk for the run folder or the cache on which only a random part of what is written has room."""
    place = _place(case)
    reference = case.bench.reference(case.setup)  # fills the cache, too
    reference = reference if place == case.run else case.bench.cache
    needed = sum(path.stat().st_size for path in files(reference))
    size = case.draw.randrange(4096, int(1.1 * needed))
    _mount(case, place, size)
    case.strike(f"{place.name}/ has room for {size:,} bytes of about {needed:,}")
    if case.end(case.start()):
        case.expects.append(FULL)
    _resize(place, ROOMY)


def full_later(case: Case) -> None:
    """A disk that another program fills at a random moment of the run."""
    place = _place(case)
    _mount(case, place, ROOMY)
    moment = moments.draw(case, *(name for name in moments.MOMENTS if name != "tokenising"))
    command = case.start()
    at = moments.reach(case, command, moment)
    left = case.draw.choice([0, 0, 4096, 100_000])
    space = os.statvfs(place)
    used = (space.f_blocks - space.f_bfree) * space.f_frsize
    if command.code() is None:
        _resize(place, max(4096, used + left))
    case.strike(f"{place.name}/ was full but for {left:,} bytes {at}")
    if case.end(command):
        case.expects.append(FULL)
    _resize(place, ROOMY)


def read_only(case: Case) -> None:
    """The run folder, its checkpoints/ or the cache cannot be written to any more, from a random moment on."""
    moment = moments.draw(case)
    command = case.start(prepare=obey_permissions)
    at = moments.reach(case, command, moment)
    inside = [case.run, case.run / "checkpoints", case.run / "sample_losses", case.cache or case.run]
    folder = case.draw.choice([path for path in inside if path.is_dir()] or [case.work])
    folder.chmod(0o555)
    case.strike(f"{folder.name}/ became read-only {at}")
    try:
        if case.end(command):
            case.expects.append(DENIED)
    finally:
        folder.chmod(0o755)


def obey_permissions() -> None:
    """Gives up root's privilege to write where permissions do not allow it (CAP_DAC_OVERRIDE)."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice: of capabilities 0-31 and 32-63
    assert libc.capget(header, sets) == 0
    for number in (0, 1):
        sets[number] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def _place(case: Case) -> Path:
    place = case.draw.choice([case.run, case.run, case.work / "cache"])
    if place != case.run:
        case.cache = place
    return place


def _mount(case: Case, place: Path, size: int) -> None:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    case.mounts.append(place)


def _resize(place: Path, size: int) -> None:
    # refused where more than that is in use by now: then it is full enough a little later
    subprocess.run(["mount", "-o", f"remount,size={size}", place], capture_output=True, check=False)
