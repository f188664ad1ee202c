"""From a checked job to its ranks: the run folder, then worker processes, this process, or placed ranks.

`launch` → `spawn` → `worker`: every rank reads the frozen config of the run folder and nothing else.
"""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from mft.config.schema import Launch, LaunchMode, freeze
from mft.console.screen import say
from mft.errors import UserError, refused_by_system
from mft.files.json_file import Values, read_json, write_json
from mft.launch import failures, multinode, placement, rank_log, resume_choice, signals, worker
from mft.launch.job import Job
from mft.launch.node_group import NodeGroup
from mft.launch.spawn import spawn
from mft.run_folder import RunStatus, lock, status
from mft.training.resume import rewind

if TYPE_CHECKING:
    from mft.training.trace import Trace


def launch_command(job: Job, dated: bool) -> None:
    """Launches the job of one `mft train`: in the folder it chooses, on this machine or on several.

    dated: whether output_dir is the default, named by the date, see `Job.choose`.
    """
    settings = OmegaConf.to_object(job.cfg.launch)
    assert isinstance(settings, Launch)
    if settings.nnodes == 1:
        launch(job, job.choose(dated)[0])
        return
    facts = {"launch.nnodes": settings.nnodes, "ranks": job.world // settings.nnodes, "data": job.data}
    fingerprints = job.identity.fingerprints.items()
    facts |= {name: value[:10] for name, value in fingerprints if not name.startswith("task.")}
    # last: what differs in the others makes the config differ, and says it better
    nodes = multinode.join(settings, facts | {"config": job.identity.extended[:10]})
    try:
        if nodes.rank == 0:
            launch(job, job.choose(dated)[0], nodes)
        elif (folder := nodes.share_folder()) is None:
            say("this run is already finished.")
        else:
            say(f"run folder {folder}, host {nodes.rank} of {len(nodes.names)}")
            _run_ranks(job, folder, nodes)
    finally:
        nodes.close()


def follow_rank0() -> None:
    """Runs this placed rank in the folder that rank 0 chooses; rank 0 alone composes, checks and hashes.

    Exits with 2 where rank 0 refused the command line: it prints its sentence, once for all.
    """
    folder = placement.broadcast_from_rank0(None)
    if folder is None:
        raise SystemExit(2)
    if folder:  # "" where the run is already finished
        worker.placed_rank_main(Path(folder))


def launch(job: Job, folder: Path, nodes: NodeGroup | None = None, trace: Trace | None = None) -> Values:
    """Runs the job in `folder`, resumes it or skips it when it is finished; returns its summary.

    nodes: the machines of the run, of which this is number 0; trace: see `mft.run.run`. Raises UserError for
    a mistake found in a rank (its sentence alone), WorkerError with the traceback of the rank that failed
    first, Stopped when a signal ended the run.
    """
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    if resume_choice.is_finished(folder, job.identity, job.cfg.train.resume):
        placement.broadcast_from_rank0("")
        if nodes:
            nodes.share_folder(None)
        say(f"{shown}: this run is already finished; see summary.json.")
        return read_json(folder / "summary.json")
    held = lock(folder)
    try:
        say(f"run folder {shown}")
        resumed, step = resume_choice.step_of(job.cfg.train.resume)
        if resumed == folder and step is not None:
            say(rewind(folder, step))
        _reopen(folder)
        cfg = copy.deepcopy(job.cfg)
        cfg.output_dir = str(folder)
        freeze(cfg, folder / "config.yaml")
        # after the config: a folder with an identity holds a run, whose config differences are shown
        write_json(folder / "identity.json", job.identity.as_json(), durable=True)
        written = read_json(folder / "overrides.json")
        write_json(folder / "overrides.json", job.describe(written.text("name")))
        # last: from here on the other ranks and hosts read the folder
        placement.broadcast_from_rank0(str(folder))
        if nodes:
            failures.forget_failures(folder / "log")
            nodes.share_folder(folder)
        _run_ranks(job, folder, nodes, trace)
    except OSError as error:
        if refusal := refused_by_system(error, folder):
            raise refusal from error
        raise
    finally:
        held.release()
    return read_json(folder / "summary.json")


def _reopen(folder: Path) -> None:
    """Notes that a finished run is trained further: where it is killed on the way, it is not finished.

    Before its identity has the new length, by which it would be. The results so far stay readable.
    """
    if status(folder) is RunStatus.finished:
        summary = read_json(folder / "summary.json")
        write_json(folder / "summary.json", summary | {"status": RunStatus.unfinished}, durable=True)


def _run_ranks(job: Job, folder: Path, nodes: NodeGroup | None, trace: Trace | None = None) -> None:
    """Runs this machine's ranks of the run in `folder`. Raises what ended it, also a signal to another
    machine."""
    settings, log = job.cfg.launch, folder / "log"
    try:
        if placement.detect_rank() is not None:
            worker.placed_rank_main(folder)
        elif settings.mode is LaunchMode.inline:
            log.mkdir(parents=True, exist_ok=True)
            with signals.handlers(worker.stop.request), rank_log.written_to(log / "rank0.log", 0):
                worker.run_job(str(folder), trace)
            if worker.stop():
                raise signals.Stopped(worker.stop.signal, signals.exit_code(folder, worker.stop.signal))
        else:
            nproc, seconds = job.world // settings.nnodes, settings.shutdown_seconds
            try:
                spawn(worker.run_job, (str(folder), trace), nproc, log, seconds, nodes)
            except signals.Stopped as stopped:
                raise signals.Stopped(stopped.signum, signals.exit_code(folder, stopped.signum)) from None
    except UserError as error:
        error.exit_code = 1  # the run had started
        raise
    if nodes and status(folder) == RunStatus.stopped:  # by a signal to another machine
        raise signals.Stopped(signal.SIGTERM, signals.SAVED)
