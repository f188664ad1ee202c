"""What ranks run in tests of launching, in place of `mft.launch.worker.run_job`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from mft.errors import UserError
from mft.launch.worker import stop


def report(run_dir: str) -> None:
    """Each rank leaves what it saw."""
    import torch

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MFT_TEST")
    facts = {name: os.environ.get(name) for name in names}
    facts |= {"threads": torch.get_num_threads(), "parent": os.getppid()}
    (Path(run_dir) / f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(facts))
    print("printed by rank", os.environ.get("RANK", 0), flush=True)


def fail(run_dir: str) -> None:
    """Rank 1 fails with a defect while rank 0 waits for it in a collective."""
    _together(raise_in=1, error=ValueError("this is the cause\nand a second line"))


def refuse(run_dir: str) -> None:
    """Rank 1 finds a mistake of the person."""
    _together(raise_in=1, error=UserError("data.paths: /nowhere does not exist"))


def be_killed(run_dir: str) -> None:
    """Rank 1 ends the way the kernel ends a process when memory runs out."""
    _together(kill=1)


def until_stopped(run_dir: str, status: str = "stopped") -> None:
    """Trains until it is asked to stop, then saves."""
    stop.listen()
    _wait(run_dir, stop)
    if os.environ.get("RANK", "0") == "0":
        (Path(run_dir) / "summary.json").write_text(json.dumps({"status": status}))


def signalled_at_its_end(run_dir: str) -> None:
    """Is asked to stop while it is tested, and finishes."""
    until_stopped(run_dir, "finished")


def deaf(run_dir: str) -> None:
    """Never looks whether it should stop."""
    stop.listen()
    _wait(run_dir, lambda: False)


def uneven(run_dir: str) -> None:
    """Rank 1 is done at once; rank 0 still works when the signal comes, and has nothing to save."""
    stop.listen()
    (Path(run_dir) / f"ready{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "0":
        _wait(run_dir, stop)


def _wait(run_dir: str, until: Callable[[], bool]) -> None:
    (Path(run_dir) / f"ready{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    while not until():
        time.sleep(0.02)


def _together(raise_in: int = -1, error: Exception | None = None, kill: int = -1) -> None:
    import torch

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.distributed.all_reduce(torch.ones(1))
    if rank == raise_in and error:
        raise error
    if rank == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))
