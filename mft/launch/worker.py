"""One rank of a run: reads run_dir/config.yaml and runs it. `torchrun -m mft.launch.worker RUN_DIR` replays a run."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

from mft import run_folder
from mft.config import plugins
from mft.console.screen import guard_logs, say
from mft.errors import UserError, full_disk
from mft.hardware import quiet_without_gpu
from mft.launch.failures import is_the_first, told, write_report
from mft.launch.rank_log import written_to

ENTRY = "mft.run:run"
"""What a worker calls: function(cfg, run_dir: Path, stop: Stop)."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVED, INTERRUPTED, UNSAVED = 75, 130, 143
"""Exit codes: ended with a checkpoint to resume from · Ctrl-C · ended by a signal without one. 75 is EX_TEMPFAIL."""

FAILED_PEER_SECONDS = 5.0
"""How long a rank goes on after another one has failed: it may be waiting for it in a collective that never ends."""


class Stop:
    """Whether this rank was asked to stop. Called by the loop every step; set by a signal."""

    def __init__(self) -> None:
        self.signal = 0
        """The first signal that asked, 0: none."""

    def __call__(self) -> bool:
        return bool(self.signal)

    def request(self, signum: int, frame: FrameType | None = None) -> None:
        """The signal handler. Later signals change nothing: a Ctrl-C reaches a worker twice, by terminal and parent."""
        self.signal = self.signal or signum


stop = Stop()

quiet_without_gpu()  # here, because the fork server imports this module before all others


def exit_code(run_dir: Path, signum: int) -> int:
    """Returns how a run that a signal ended leaves: 130 after Ctrl-C, else 75 with and 143 without a checkpoint."""
    if signum == signal.SIGINT:
        return INTERRUPTED
    return SAVED if run_folder.status(run_dir) in ("stopped", "finished") else UNSAVED


def worker(run_dir: str, entry: str = ENTRY) -> None:
    """Runs the run of a folder in this rank. Raises UserError for mistakes and for memory that ran out.

    Ends with SystemExit and the code of `exit_code` when a signal asked to stop: the run has ended in good order then.
    """
    from omegaconf import OmegaConf

    from mft.config.interpolations import check_variables
    from mft.config.schema import read
    from mft.launch.out_of_memory import explain

    folder = Path(run_dir)
    stop.signal = 0
    for name in SIGNALS:
        if signal.getsignal(name) != signal.SIG_IGN:  # nohup
            signal.signal(name, stop.request)
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config} does not exist: give the folder of a run")
    plugins.name(run_folder.plugins_of(folder))
    cfg = read(config)
    check_variables(cfg)
    try:
        module, _, function = entry.partition(":")
        getattr(importlib.import_module(module), function)(cfg, folder, stop)
    except Exception as error:
        explained = explain(error, cast("dict[str, Any]", OmegaConf.to_container(cfg))) or full_disk(error, folder)
        if explained is None:
            raise
        raise explained from error
    if stop():
        raise SystemExit(exit_code(folder, stop.signal))


def enter(
    reports: str,
    function: Callable[..., Any],
    arguments: Sequence[Any] = (),
    variables: Mapping[str, str] | None = None,
    first_rank: int = 0,
) -> Any:
    """Calls function(*arguments) as one rank of a group, and sees to it that a failure is reported and nothing is left.

    reports: folder for rank<r>.error.json (what failed) and rank<r>.log (what it prints; rank 0 has the terminal, too);
    variables: environment of the launching process, which a fork server does not know, None for a rank that was placed
    from outside; first_rank: number of this machine's first rank.
    """
    os.environ.update(variables or {})
    rank = first_rank + int(os.environ.get("RANK", 0))
    if first_rank:
        os.environ["RANK"] = str(rank)
    report = Path(reports) / f"rank{rank}.error.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    started = time.time()
    guard_logs()
    with written_to(report.with_name(f"rank{rank}.log"), rank) as terminal:
        _take_share_of_cores()
        gc.freeze()  # else an engine that ends makes the collector walk over all that was imported: 0.3 to 0.5 s
        threading.Thread(target=_watch, args=(report, started), daemon=True, name="watchdog").start()
        try:
            _require_untouched_gpu()
            result = function(*arguments)
        except Exception as error:
            with suppress(OSError):  # of a full disk the parent learns by the room that is left
                write_report(report, error, rank)
            if rank > 0:
                with suppress(OSError):
                    traceback.print_exc()
                if variables is None and is_the_first(report, started):  # nobody else would tell the person
                    os.write(terminal, f"{told(error, rank)}\n".encode())
            raise
    for name in SIGNALS:  # what is left is to wait for the others; nobody would see a flag any more
        signal.signal(name, lambda signum, frame: os._exit(SAVED))
    if stop():
        raise SystemExit(SAVED)
    return result


def _take_share_of_cores() -> None:
    """Divides the cores among the ranks of this machine, unless OMP_NUM_THREADS says otherwise.

    A forked rank has OpenMP loaded already, which reads the variable only once: so torch is told, too.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(share))))


def _require_untouched_gpu() -> None:
    import torch

    assert not torch.cuda._is_in_bad_fork(), "a preloaded module initialised CUDA: no worker could use a GPU"


def _watch(report: Path, started: float) -> None:
    """Ends this rank when the launching process is gone (kill -9 leaves no other trace), or a peer has failed."""
    parent = multiprocessing.parent_process()
    started_by = os.getppid()
    failed_since: float | None = None
    while True:
        if parent is not None:
            parent.join(0.5)  # waits for the process that asked the fork server for this one, not for the fork server
            gone = not parent.is_alive()
        else:
            time.sleep(0.5)
            gone = os.getppid() != started_by
        if gone:
            os._exit(UNSAVED)
        others = (path for path in report.parent.glob("*.error.json") if path != report)
        if any(path.stat().st_mtime >= started for path in others):  # an older one is of an earlier attempt
            failed_since = failed_since or time.monotonic()
            if time.monotonic() - failed_since > FAILED_PEER_SECONDS:
                os._exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m mft.launch.worker RUN_DIR`, alone, under torchrun or under srun."""
    from mft.launch.launch import place

    folders = list(sys.argv[1:] if arguments is None else arguments)
    if len(folders) != 1:
        raise SystemExit(
            "usage: python -m mft.launch.worker RUN_DIR   (or torchrun --nproc-per-node N -m mft.launch.worker RUN_DIR)"
        )
    place()
    try:
        enter(str(Path(folders[0]) / "log"), worker, (folders[0],))
    except UserError as error:
        say(error, sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
