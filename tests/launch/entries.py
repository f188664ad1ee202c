"""What ranks run in tests of launching, in place of `mft.launch.worker.run_job`."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mft.errors import UserError
from mft.launch.worker import run_job, stop


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


def fail_and_hang(run_dir: str) -> None:
    """Each rank fails, and what a library does at the end of the process waits forever, as NCCL may for its
    kernels: here the C function pause, which only a signal ends."""
    import ctypes

    process = ctypes.CDLL(None)
    process.on_exit(process.pause, None)
    raise UserError("data.paths: /nowhere does not exist")


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


def train(run_dir: str) -> None:
    """Runs the frozen run of the folder, as `run_job` does."""
    rank = os.environ["RANK"]
    (Path(run_dir) / f"ready{rank}").write_text(str(os.getpid()))
    run_job(run_dir)


def save_slowly(run_dir: str, seconds: float = 3600.0) -> None:
    """The same, but rank 0 takes so long to complete its first checkpoint."""
    from mft.training import checkpoint

    seal = checkpoint.seal

    def slow_seal(folder: Path, *arguments: Any) -> None:
        saving = Path(run_dir) / "saving"
        if not saving.exists():
            saving.touch()
            time.sleep(seconds)
        seal(folder, *arguments)

    checkpoint.seal = slow_seal  # type: ignore[assignment]
    train(run_dir)


def save_for_a_while(run_dir: str) -> None:
    """The same, but longer than a collective may take."""
    save_slowly(run_dir, 8.0)


def deadlock(run_dir: str) -> None:
    """The same, but rank 1 waits forever in its third step."""
    from mft.training.trainer import Trainer

    learning_rate = Trainer.set_learning_rate

    def deadlocked(trainer: Trainer, step: int) -> float:
        if trainer.engine.rank == 1 and step == 3:
            threading.Event().wait()
        return learning_rate(trainer, step)

    Trainer.set_learning_rate = deadlocked  # type: ignore[method-assign]
    train(run_dir)


def blocked_signals(folder: str) -> None:
    """Writes which signals do not reach this rank."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    (Path(folder) / f"blocked{os.environ['RANK']}").write_text(str(blocked))
