"""Which rank this process is, and how many there will be.

Ranks are placed from outside (torchrun, accelerate launch, srun) or started by this command, see
`mft.launch.launch`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, shortened
from mft.hardware import visible_gpus

if TYPE_CHECKING:
    from torch.distributed import Store

CHECKING = timedelta(hours=24)
"""How long ranks wait until rank 0 has checked its command line and read all data, at most."""

_stores: list[Store] = []
"""The store of the placed ranks, then one more for each broadcast; kept, since rank 0's serves the others."""


@dataclass(frozen=True)
class RankInfo:
    """The rank that this process was started as from outside."""

    rank: int
    """Number among all ranks, from 0."""
    world: int
    """Ranks of the whole group."""


def detect_rank() -> RankInfo | None:
    """Returns the rank that torchrun, accelerate launch or srun started this process as, None without them.

    SLURM's variables are translated into torch's (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT); those that are set already stay. A step of one task, and a batch script outside
    srun, are not ranks: they launch.
    """
    variables = os.environ
    # a batch script has SLURM_NTASKS, too; only inside srun does it count processes beside this one
    in_step = "SLURM_STEP_ID" in variables or "SLURM_STEP_NUM_TASKS" in variables
    tasks = _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS") or 1 if in_step else 1
    if "RANK" not in variables and tasks > 1 and "SLURM_PROCID" in variables:
        hosts = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "127.0.0.1")
        first_host = re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", hosts).split(",")[0]  # gpu[03-05,9] -> gpu03
        per_node = variables.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))  # 4(x2),3
        variables["RANK"] = variables["SLURM_PROCID"]
        variables["WORLD_SIZE"] = str(tasks)
        variables["LOCAL_RANK"] = variables.get("SLURM_LOCALID", "0")
        variables.setdefault("LOCAL_WORLD_SIZE", re.split(r"[(,]", per_node)[0])
        variables.setdefault("MASTER_ADDR", first_host)
        # every task must find the same free port without talking to the others
        variables.setdefault("MASTER_PORT", str(20000 + int(variables.get("SLURM_JOB_ID", 0)) % 10000))
    if not all(name in variables for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    return RankInfo(_number("RANK"), _number("WORLD_SIZE"))


def _number(variable: str) -> int:
    """Returns the number in a variable of the environment, 0 where it is not set."""
    try:
        return int(os.environ.get(variable) or 0)
    except ValueError:
        raise UserError(
            f"{variable}={shortened(os.environ[variable])} must be a whole number: torchrun, accelerate "
            "launch or srun sets it; unset it to start ranks from here."
        ) from None


def ranks(nproc: int | str, mode: str = "processes", jobs: int = 1) -> int:
    """Returns the number of ranks on this machine: the placed ones, else launch.nproc.

    nproc: auto is all visible GPUs, divided among the `jobs` that run side by side, or 1 without GPUs; mode:
    `launch.mode`, inline has one rank. Raises UserError for a number that is impossible here.
    """
    placed = detect_rank()
    if placed is not None:
        return placed.world
    if mode == "inline":
        if str(nproc) not in ("auto", "1"):
            raise UserError(f"launch.nproc={nproc}: launch=inline runs one rank; choose launch=processes.")
        return 1
    gpus = visible_gpus()
    if str(nproc) == "auto":
        return max(1, gpus // jobs)
    if not str(nproc).isdigit() or int(nproc) < 1:
        nproc = "null" if nproc is None else nproc
        raise UserError(f"launch.nproc={nproc} must be at least 1, or auto: all visible GPUs, 1 without any.")
    if gpus and jobs * int(nproc) > gpus:
        each = f" in each of launch.jobs={jobs} jobs" if jobs > 1 else ""
        raise UserError(f"launch.nproc={nproc}{each}: every rank needs a GPU, and {gpus} are visible.")
    return int(nproc)


def broadcast_from_rank0(value: Any) -> Any:
    """Returns rank 0's value (of JSON) on every placed rank; without placed ranks, the value itself.

    All ranks call it equally often. It works before any engine is up.
    """
    placed = detect_rank()
    if placed is None or placed.world == 1:
        return value
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # over the store itself: a process group would leave addresses there that break the engine's own group
    if not _stores:
        _stores.append(next(rendezvous("env://"))[0])
        _stores[0].set_timeout(CHECKING)
    store = PrefixStore(f"mft/broadcast/{len(_stores)}", _stores[0])
    _stores.append(store)
    if placed.rank == 0:
        store.set("value", json.dumps(value))
    return json.loads(store.get("value").decode())


@contextmanager
def refusing_for_all() -> Iterator[None]:
    """Context of rank 0: a failure before it has named the run folder is announced to the waiting ranks."""
    before = len(_stores)
    try:
        yield
    except Exception:
        if len(_stores) == before:
            broadcast_from_rank0(None)
        raise
