"""One rank of a run: `torchrun -m mft.launch.worker RUN_DIR` replays a run, `spawn` calls `rank_main` in each
process.

A rank never outlives the process that started it, reports its failure, and does not wait forever for a rank
that failed.
"""

from __future__ import annotations

import atexit
import gc
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
from typing import TYPE_CHECKING, Any

from mft import run_folder
from mft.config import plugins
from mft.console.screen import guard_logs, say
from mft.distributed import determinism, heartbeat
from mft.distributed.stalled import Stalled
from mft.errors import UserError, refused_by_system
from mft.hardware import growing_segments, has_gpu, quiet_without_gpu
from mft.launch import failures, placement, rank_log, signals, stacks, torch_private

if TYPE_CHECKING:
    from mft.training.trace import Trace

FAILED_PEER_SECONDS = 5.0
"""How long a rank lives after another one failed: it may wait for that one in a collective that never ends,
but should first get the chance to report its own error."""

stop = signals.Stop()
"""Whether this rank was asked to stop."""

# here, because the fork server imports this module before all others, torch among them
quiet_without_gpu()
growing_segments()


def run_job(run_dir: str, trace: Trace | None = None) -> None:
    """Runs the run of a folder in this rank: reads its config.yaml and trains. trace: see `mft.run.run`.

    Raises UserError for mistakes, and for failures that have a sentence, such as memory that ran out. A
    signal lets it stop in good order; the caller looks at `stop` afterwards.
    """
    from mft.config.interpolations import check_variables
    from mft.config.schema import read
    from mft.launch.out_of_memory import explain
    from mft.run import run

    folder = Path(run_dir)
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config} does not exist: give the folder of a run.")
    plugins.name(run_folder.plugins_of(folder))
    cfg = read(config)
    check_variables(cfg)
    stop.listen()
    try:
        run(cfg, folder, stop, trace)
    except Exception as error:
        causes = (heartbeat.explained(error), explain(error, cfg, folder), determinism.explain(error))
        if explained := next(filter(None, causes), None) or refused_by_system(error, folder):
            raise explained from error
        raise


def rank_main(
    log: str, function: Callable[..., Any], arguments: Sequence[Any], variables: Mapping[str, str] | None
) -> Any:
    """Calls function(*arguments) as one rank of a group; returns its result.

    Reports a failure, and exits with the code of `exit_code` when a signal asked to stop.

    log: the run's folder for rank<r>.error.json (what failed) and rank<r>.log (what it prints; rank 0 keeps
    the terminal as well); variables: environment of the launching process, which a fork server does not know,
    None for a rank that was placed from outside.
    """
    signals.let_through()
    os.environ.update(variables or {})
    rank = int(os.environ.get("RANK", 0))
    report = Path(log) / f"rank{rank}.error.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    started = time.time()
    guard_logs()
    with rank_log.written_to(report.with_name(f"rank{rank}.log"), rank) as terminal:
        stacks.written_to(report.with_name(f"rank{rank}.log"))
        _limit_threads()
        gc.freeze()  # else closing an engine makes the collector walk over all imports: 0.3 to 0.5 s
        threading.Thread(target=_watch, args=(report, rank, started), daemon=True, name="watchdog").start()
        try:
            # else no rank could use a GPU; CUDA builds of torch say so of a machine without one as well
            assert not has_gpu() or not torch_private.forked_after_cuda(), (
                "a preloaded module initialised CUDA"
            )
            result = function(*arguments)
        except Exception as error:
            # a full disk takes neither report nor traceback; the launching process looks at the free space
            with suppress(OSError):
                failures.write_report(report, error, rank)
            if isinstance(error, Stalled):
                stacks.dump(error)
            if rank > 0:
                with suppress(OSError):
                    traceback.print_exc()
                # a placed rank has no launching process of ours to show it
                if variables is None and failures.is_root_cause(report, started):
                    os.write(terminal, f"{failures.render_failure(error, rank)}\n".encode())
            raise
    # only waiting for the other ranks is left, and nothing looks at `stop` any more
    for name in signals.SIGNALS:
        signal.signal(name, lambda signum, frame: os._exit(signals.SAVED))
    if stop():
        code = signals.exit_code(Path(log).parent, stop.signal)
        # a launching process that was signalled takes no result any more, and looks into the folder itself
        raise SystemExit(code if code or variables is None else signals.SAVED)
    return result


def placed_rank_main(run_dir: Path) -> None:
    """Runs the run of a folder as the rank that this process was placed as (torchrun, accelerate launch,
    srun).

    Only rank 0 is sure to be seen by a person: where it lost its connection to a rank that failed, it raises
    the error of that rank. A rank that fails ends before Python destroys what libraries hold, where NCCL
    would wait for kernels that never end.
    """
    since, log = time.time(), run_dir / "log"
    failed: list[bool] = []
    atexit.register(_end_at_once, failed)  # early: those registered later are called before it
    try:
        rank_main(str(log), run_job, (str(run_dir),), None)
    except Exception:
        failed.append(True)
        placed = placement.detect_rank()
        is_rank_0 = placed is None or placed.rank == 0
        if is_rank_0 and (cause := failures.cause_elsewhere(log / "rank0.error.json", since)):
            raise cause from None
        raise


def _end_at_once(failed: Sequence[bool]) -> None:
    """Ends the process where its rank has failed, with the exit code that the command has then."""
    if failed:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(1)


def _limit_threads() -> None:
    """Divides the cores among the ranks of this machine, unless OMP_NUM_THREADS says otherwise."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # a forked rank has OpenMP loaded already, which reads the variable only once
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(threads))))


def _watch(report: Path, rank: int, started: float) -> None:
    """Ends this rank when the launching process is gone (kill -9 leaves no other trace), or a peer has failed
    or stalled: then its stacks are in its log."""
    parent = multiprocessing.parent_process()  # the process that asked the fork server, not the server
    started_by = os.getppid()
    failed_since: float | None = None
    while True:
        if parent is not None:
            parent.join(0.5)
            gone = not parent.is_alive()
        else:  # placed from outside
            time.sleep(0.5)
            gone = os.getppid() != started_by
        if gone:
            os._exit(signals.UNSAVED)
        failed = [
            path for path in report.parent.glob("*.error.json") if path != report and newer(path, started)
        ]
        stalled = heartbeat.stalled()
        if not (failed or stalled):
            continue
        if failed_since is None:
            failed_since = time.monotonic()
            stacks.dump(stalled or f"another rank has failed ({failed[0].name})")
        if time.monotonic() - failed_since > FAILED_PEER_SECONDS:
            if stalled and not report.exists():  # the main thread waits where nothing reaches it
                with suppress(OSError):
                    failures.write_report(report, stalled, rank)
            os._exit(1)


def newer(report: Path, started: float) -> bool:
    """Whether a report was written since then; an older one is of an earlier attempt, and may be removed by
    its rank at this very moment."""
    try:
        return report.stat().st_mtime >= started
    except OSError:
        return False


def main(arguments: Sequence[str]) -> None:
    """`python -m mft.launch.worker RUN_DIR`, alone, under torchrun or under srun."""
    if len(arguments) != 1:
        command = "-m mft.launch.worker RUN_DIR"
        raise SystemExit(f"usage: python {command}   (or torchrun --nproc-per-node N {command})")
    placement.detect_rank()  # translates SLURM's variables
    try:
        placed_rank_main(Path(arguments[0]))
    except UserError as error:
        say(error, sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1:])
