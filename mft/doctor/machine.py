"""Cores, memory and limits of this process, as the system and its control group have them."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator

from mft.doctor.finding import Finding, Part
from mft.hardware import control_group, machine_memory

GIB = 2**30
FILES_WANTED = 4096
"""File handles that many tasks, their caches and a loader of shards may have open together."""
FILES_LEAST = 256
"""Fewer than these, and ranks fail to open the files of a model in several parts."""

part = Part("machine")


def findings() -> Iterator[Finding]:
    """Yields a line for cores, memory, open files and git."""
    yield _cores()
    yield _memory()
    yield _open_files()
    if shutil.which("git"):
        yield part.ok("git", "installed: a run records the commit of its folder")
    else:
        yield part.note("git", "not installed: a run cannot record its commit", "install git")


def _cores() -> Finding:
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    found = f"{usable} of {there} may be used by this process"
    quota, _, period = control_group("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and (share := int(quota) / int(period)) < usable:
        cure = f"set OMP_NUM_THREADS={max(1, int(share))}, so that ranks do not start more threads"
        return part.note("cores", f"{found}, the control group allows the time of {share:g}", cure)
    return part.ok("cores", found)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:,.1f} of {memory.total / GIB:,.1f} GiB are free"
    if (allowed := machine_memory()) < memory.total:
        return part.note("memory", f"{found}; the control group allows {allowed / GIB:,.1f} GiB")
    return part.ok("memory", found)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,} (ulimit -n)"
    cure = f"ulimit -n {FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)}"
    if soft == resource.RLIM_INFINITY or soft >= FILES_WANTED:
        return part.ok("open files", shown)
    if soft < FILES_LEAST:
        return part.problem("open files", shown, cure)
    return part.note("open files", f"{shown}; many tasks and ranks need more", cure if hard > soft else "")
