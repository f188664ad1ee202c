"""Where ranks come from: worker processes of this command, this very process, or placed from outside (torchrun, SLURM).

torch is imported only when something is launched.
"""

from __future__ import annotations

import os
import pickle
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.errors import UserError
from mft.hardware import visible_gpus
from mft.launch import worker
from mft.launch.failures import cause_elsewhere
from mft.launch.hosts import Hosts
from mft.launch.rank_log import written_to
from mft.launch.spawn import PRELOAD, Stopped, WorkerError, handlers, start, warm

__all__ = ["Place", "Stopped", "WorkerError", "launch", "place", "ranks", "share", "warm"]

_stores: list[Any] = []
"""The store of the placed ranks and its prefixes used so far; kept, since rank 0's serves the others."""


@dataclass(frozen=True)
class Place:
    """The rank that this process was started as from outside."""

    rank: int
    local_rank: int
    world: int


def place() -> Place | None:
    """Returns this process's place if torchrun, accelerate launch or srun started it as a rank, else None.

    SLURM's variables are translated into torch's (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT); those that are set already stay. A step of one task, and a batch script outside srun, are no rank:
    they launch.
    """
    variables = os.environ
    in_step = "SLURM_STEP_ID" in variables or "SLURM_STEP_NUM_TASKS" in variables
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS") or variables.get("SLURM_NTASKS") or 1) if in_step else 1
    if "RANK" not in variables and tasks > 1 and "SLURM_PROCID" in variables:
        host = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "127.0.0.1")
        first = re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", host).split(",")[0]  # gpu[03-05,9] -> gpu03
        per_node = variables.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))
        variables["RANK"] = variables["SLURM_PROCID"]
        variables["WORLD_SIZE"] = str(tasks)
        variables["LOCAL_RANK"] = variables.get("SLURM_LOCALID", "0")
        variables.setdefault("LOCAL_WORLD_SIZE", re.split(r"[(,]", per_node)[0])
        variables.setdefault("MASTER_ADDR", first)
        variables.setdefault("MASTER_PORT", str(20000 + int(variables.get("SLURM_JOB_ID", 0)) % 10000))
    if not all(name in variables for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    return Place(int(variables["RANK"]), int(variables["LOCAL_RANK"]), int(variables["WORLD_SIZE"]))


def ranks(nproc: int | str, mode: str = "processes") -> int:
    """Returns how many ranks a run will have: the placed ones, else `launch.nproc`, with auto = visible GPUs or 1.

    mode: `launch.mode`; inline has one rank. Raises UserError for a number that cannot be.
    """
    placed = place()
    if placed is not None:
        return placed.world
    if str(getattr(mode, "value", mode)) == "inline":
        if str(nproc) not in ("auto", "1"):
            raise UserError(f"launch.mode=inline runs one rank, but launch.nproc={nproc}; choose launch=processes")
        return 1
    if str(nproc) == "auto":
        return max(1, visible_gpus())
    if not str(nproc).isdigit() or int(nproc) < 1:
        raise UserError(f"launch.nproc={nproc}: give a number of ranks from 1, or auto (all visible GPUs, 1 without)")
    gpus = visible_gpus()
    if gpus and int(nproc) > gpus:
        raise UserError(f"launch.nproc={nproc}, but {gpus} GPUs are visible; a rank needs one of its own")
    return int(nproc)


def share(value: Any) -> Any:
    """Returns rank 0's value on every placed rank, before any engine is up; else the value itself.

    All ranks call it equally often; the value must pickle (it goes between our own ranks only).
    """
    placed = place()
    if placed is None or placed.world == 1:
        return value
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # over the store itself: a process group here would leave its addresses behind for the engine's to stumble over
    if not _stores:
        _stores.append(next(rendezvous("env://"))[0])
    store = PrefixStore(f"mft/share/{len(_stores)}", _stores[0])
    _stores.append(store)
    if placed.rank == 0:
        store.set("value", pickle.dumps(value).hex())
    return pickle.loads(bytes.fromhex(store.get("value").decode()))


def launch(
    run_dir: Path | str,
    nproc: int | str = "auto",
    mode: str = "processes",
    shutdown_seconds: int = 600,
    preload: Sequence[str] = PRELOAD,
    entry: str = worker.ENTRY,
    hosts: Hosts | None = None,
) -> None:
    """Runs the run of a folder in its ranks and returns when all of them have ended well.

    nproc: ranks on this machine; mode: processes, or inline (one rank, in this process); hosts: the machines whose
    ranks make one group with these. Ranks that are placed from outside run in this process.
    Raises UserError for a mistake found in a rank (its sentence alone), WorkerError with the traceback of the rank
    that failed first, Stopped when a signal ended the run.
    """
    arguments = (str(run_dir), entry)
    log = Path(run_dir) / "log"
    placed = place()
    if placed is not None:
        _placed(log, arguments, placed.rank)
        return
    world = ranks(nproc, mode)
    if str(getattr(mode, "value", mode)) == "inline":
        _inline(log, arguments)
    else:
        try:
            start(worker.worker, arguments, world, log, shutdown_seconds, preload, hosts)
        except Stopped as stopped:
            raise Stopped(stopped.signum, worker.exit_code(Path(run_dir), stopped.signum)) from None


def _placed(log: Path, arguments: tuple[str, str], rank: int) -> None:
    since = time.time()
    try:
        worker.enter(str(log), worker.worker, arguments)
    except Exception:
        if rank == 0 and (cause := cause_elsewhere(log / "rank0.error.json", since)):
            raise cause from None
        raise


def _inline(log: Path, arguments: tuple[str, str]) -> None:
    log.mkdir(parents=True, exist_ok=True)
    with handlers(worker.stop.request), written_to(log / "rank0.log", 0):
        try:
            worker.worker(*arguments)
        except SystemExit as error:
            raise Stopped(worker.stop.signal, int(error.code or 0)) from None
