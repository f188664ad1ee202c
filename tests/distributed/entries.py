"""What a worker runs in tests of launching, in place of mft.run:run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from mft.errors import UserError


def tell(cfg: Any, run_dir: Path, stop: Any) -> None:
    """Each rank leaves what it saw."""
    import torch

    facts = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MFT_TEST")}
    facts |= {"name": cfg.name, "threads": torch.get_num_threads()}
    (run_dir / f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(facts))
    print("told by rank", os.environ.get("RANK", 0), flush=True)


def fail(cfg: Any, run_dir: Path, stop: Any) -> None:
    """Rank 1 fails with a defect while rank 0 waits for it in a collective."""
    _together(raise_in=1, error=ValueError("this is the cause\nand a second line"))


def refuse(cfg: Any, run_dir: Path, stop: Any) -> None:
    """Rank 1 finds a mistake of the person."""
    _together(raise_in=1, error=UserError("data.paths: /nowhere does not exist"))


def exhaust(cfg: Any, run_dir: Path, stop: Any) -> None:
    """Rank 1 asks for more memory than any machine has."""
    import torch

    if os.environ["RANK"] == "1":
        torch.empty(2**60)
    time.sleep(60)


def be_killed(cfg: Any, run_dir: Path, stop: Any) -> None:
    """Rank 1 goes the way the kernel ends a process when memory runs out."""
    _together(kill=1)


def until_stopped(cfg: Any, run_dir: Path, stop: Any) -> None:
    """Trains until it is asked to stop, then saves."""
    _wait(run_dir, stop)
    if os.environ.get("RANK", "0") == "0":
        (run_dir / "summary.json").write_text(json.dumps({"status": "stopped"}))


def deaf(cfg: Any, run_dir: Path, stop: Any) -> None:
    """Never looks whether it should stop."""
    _wait(run_dir, lambda: False)


def uneven(cfg: Any, run_dir: Path, stop: Any) -> None:
    """Rank 1 is done at once; rank 0 still works when the signal comes, and has nothing to save."""
    (run_dir / f"ready{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "0":
        _wait(run_dir, stop)


def _wait(run_dir: Path, stop: Any) -> None:
    (run_dir / f"ready{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    while not stop():
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
