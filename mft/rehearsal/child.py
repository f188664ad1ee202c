"""The process that rehearses: forked from the fork server, without a GPU, its end a sentence in any case."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mft
from mft.config import plugins
from mft.config.schema import freeze
from mft.console.screen import guard_logs
from mft.distributed.accelerator import RANK_VARIABLES
from mft.errors import UserError
from mft.launch import spawn
from mft.launch.job import Job
from mft.launch.signals import let_through
from mft.plan.gpus import CPU, Device, device, visible


def rehearse(job: Job) -> None:
    """Rehearses a checked job. Raises UserError for what a run of it would fail with."""
    spawn.start_fork_server()
    context: Any = multiprocessing.get_context(spawn.start_method())
    receiving, sending = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="mft-rehearsal-") as folder:
        freeze(job.cfg, Path(folder) / "config.yaml")
        seen = (visible() or [device(CPU)])[0]  # here, since the rehearsal sees no GPU
        given = (folder, str(job.cfg.output_dir), job.world, seen, job.plugins, spawn.environment(), sending)
        process = context.Process(target=_main, args=given, daemon=True)
        process.start()
        sending.close()  # so that the end of the process is the end of what can be received
        problem: str | None = None
        with suppress(EOFError):
            problem = receiving.recv()
        process.join()
    if problem is None:
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        problem = f"The rehearsal was ended by {how}: a library crashed, or memory ran out. See `mft doctor`."
    if problem:
        raise UserError(problem)


def _main(
    folder: str,
    output_dir: str,
    world: int,
    seen: Device,
    packages: Sequence[str],
    variables: dict[str, str],
    answer: Connection,
) -> None:
    """Rehearses the config of a folder and answers with a sentence, "" where all went well."""
    let_through()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that waits for this one
    for name in RANK_VARIABLES:  # of torchrun or srun: this process is alone
        os.environ.pop(name, None)
    os.environ.update(variables)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    guard_logs()
    from mft.config.interpolations import check_variables
    from mft.config.schema import read
    from mft.errors import full_disk
    from mft.rehearsal.rehearse import Rehearsal

    rehearsal, problem = Rehearsal(Path(folder), Path(output_dir), world, seen), ""
    try:
        plugins.name(packages)
        cfg = read(Path(folder) / "config.yaml")
        check_variables(cfg)
        rehearsal.perform(cfg)
    except UserError as error:
        problem = str(error)
    except Exception as error:
        refusal = full_disk(error)
        problem = str(refusal) if refusal else f"The rehearsal failed {rehearsal.doing}: {where(error)}"
    with suppress(BrokenPipeError):  # Ctrl-C has ended the process that waited
        answer.send(problem)


def where(error: Exception) -> str:
    """Returns what was raised, and the line that raised it: the innermost one that is neither of mft nor of
    an installed package, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = str(Path(mft.__file__).parent)
    theirs = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(own)]
    frame = (theirs or frames)[-1]
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:500]} ({frame.filename}:{frame.lineno}, {frame.name})"
