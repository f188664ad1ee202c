"""From a checked job to its ranks: the run folder, then worker processes, this very process, or placed ranks.

`launch` → `spawn` → `worker`: every rank reads the frozen config of the run folder and nothing else.
"""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mft import run_folder
from mft.config.schema import Launch, LaunchMode, freeze
from mft.console.screen import say
from mft.errors import UserError, full_disk
from mft.files.json_file import read_json, write_json
from mft.launch import multinode, worker
from mft.launch.failures import forget_failures
from mft.launch.job import Job
from mft.launch.multinode import NodeGroup
from mft.launch.placement import broadcast_from_rank0, broadcasts, detect_rank
from mft.launch.rank_log import written_to
from mft.launch.resume_choice import is_finished, step_of
from mft.launch.signals import SAVED, Stopped, exit_code, handlers
from mft.launch.spawn import spawn
from mft.run_folder import RunStatus
from mft.training.resume import rewind


def launch_command(job: Job, dated: bool, say: Callable[[str], None] = say) -> None:
    """Launches the job of one `mft train`: in the folder it chooses, on this machine or on several.

    dated: whether output_dir was made up from the date, see `Job.choose`.
    """
    with joined(job) as nodes:
        if nodes is None or nodes.rank == 0:
            launch(job, job.choose(dated)[0], say, nodes)
        elif (folder := nodes.share_folder()) is None:
            say("this run is already finished.")
        else:
            say(f"run folder {folder}, host {nodes.rank} of {len(nodes.names)}")
            _run_ranks(job, folder, nodes)


def follow_rank0() -> None:
    """Runs this placed rank in the folder that rank 0 chooses; rank 0 alone composes, checks and hashes.

    Exits with 2 where rank 0 refused the command line: it prints its sentence, once for all.
    """
    folder = broadcast_from_rank0(None)
    if folder is None:
        raise SystemExit(2)
    if folder:  # else the run is finished already
        worker.placed_rank_main(Path(folder) / "log", worker.run_job, (folder,))


@contextmanager
def refusing_for_all() -> Iterator[None]:
    """Context of rank 0: what fails before it has named the folder is announced to the ranks that wait for
    it."""
    before = broadcasts()
    try:
        yield
    except Exception:
        if broadcasts() == before:
            broadcast_from_rank0(None)
        raise


def launch(
    job: Job, folder: Path, say: Callable[[str], None] = say, nodes: NodeGroup | None = None
) -> dict[str, Any]:
    """Runs the job in `folder`, resumes it or skips it when it is finished; returns its summary.

    nodes: the machines of the run, of which this is number 0. Raises UserError for a mistake found in a rank
    (its sentence alone), WorkerError with the traceback of the rank that failed first, Stopped when a signal
    ended the run.
    """
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    if is_finished(folder, job.identity, job.cfg.train.resume):
        broadcast_from_rank0("")
        if nodes:
            nodes.share_folder(None)
        say(f"{shown}: this run is already finished; see summary.json.")
        return read_json(folder / "summary.json")
    lock = run_folder.lock(folder)
    try:
        say(f"run folder {shown}")
        resumed, step = step_of(job.cfg.train.resume)
        if resumed == folder and step is not None:
            say(rewind(folder, step))
        cfg = copy.deepcopy(job.cfg)
        cfg.output_dir = str(folder)
        freeze(cfg, folder / "config.yaml")
        write_json(folder / "identity.json", job.identity.as_json(), durable=True)
        write_json(folder / "overrides.json", job.describe())
        broadcast_from_rank0(str(folder))
        if nodes:
            forget_failures(folder / "log")
            nodes.share_folder(folder)
        _run_ranks(job, folder, nodes)
    except OSError as error:
        raise full_disk(error, folder) or error from error
    finally:
        lock.release()
    return read_json(folder / "summary.json")


def _run_ranks(job: Job, folder: Path, nodes: NodeGroup | None = None) -> None:
    """Runs this machine's ranks of the run in `folder`. Raises what ended it, also a signal to another
    machine."""
    settings, log, arguments = job.cfg.launch, folder / "log", (str(folder),)
    try:
        if detect_rank() is not None:
            worker.placed_rank_main(log, worker.run_job, arguments)
        elif settings.mode is LaunchMode.inline:
            _run_inline(folder)
        else:
            nproc = job.world // settings.nnodes
            try:
                spawn(worker.run_job, arguments, nproc, log, settings.shutdown_seconds, nodes)
            except Stopped as stopped:
                raise Stopped(stopped.signum, exit_code(folder, stopped.signum)) from None
    except UserError as error:
        error.exit_code = 1  # the run had started
        raise
    if nodes and run_folder.status(folder) == RunStatus.stopped:  # by a signal to another machine
        raise Stopped(signal.SIGTERM, SAVED)


def _run_inline(folder: Path) -> None:
    log = folder / "log"
    log.mkdir(parents=True, exist_ok=True)
    with handlers(worker.stop.request), written_to(log / "rank0.log", 0):
        worker.run_job(str(folder))
    if worker.stop():
        raise Stopped(worker.stop.signal, exit_code(folder, worker.stop.signal))


@contextmanager
def joined(job: Job) -> Iterator[NodeGroup | None]:
    """The machines of the job, which have met and agree on what they run; None: it has one machine."""
    if job.cfg.launch.nnodes == 1:
        yield None
        return
    settings = OmegaConf.to_object(job.cfg.launch)
    assert isinstance(settings, Launch)
    facts = {"launch.nnodes": settings.nnodes, "ranks": job.world // settings.nnodes, "data": job.data}
    facts |= {
        name: value[:10] for name, value in job.identity.fingerprints.items() if not name.startswith("task.")
    }
    nodes = multinode.join(settings, facts | {"config": job.identity.extended[:10]})
    try:
        yield nodes
    finally:
        nodes.close()
