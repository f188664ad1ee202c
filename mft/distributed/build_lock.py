"""Builds the op that DeepSpeed compiles for CPUs, under a lock that a killed process releases."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def load() -> None:
    """Compiles and loads the op (shared memory among ranks), so that DeepSpeed finds it loaded.

    torch guards a build by a file that is only there or not there. A rank that is killed while it builds
    leaves it behind, and every later start would silently wait for it forever.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from filelock import FileLock
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.NAME, False))
    with FileLock(folder / "mft.lock"):
        remove_abandoned(folder / "lock")
        builder.load(verbose=False)


def remove_abandoned(file: Path) -> None:
    """Removes the file that guards a build if no process has it open, as the one that builds has."""
    import psutil

    if not file.exists():
        return
    for process in psutil.process_iter():
        try:
            if str(file) in [opened.path for opened in process.open_files()]:
                return
        except psutil.Error:
            continue  # gone by now, or another user's
    log.warning("removed stale build lock %s", file)
    file.unlink(missing_ok=True)
