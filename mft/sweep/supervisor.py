"""The process that supervises one job: forked from the fork server, it runs the job's ranks.

It writes the output of its job to `log/output.txt` in the run folder, and ends with the sweep: kill -9 of the
sweep leaves nothing running.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mft.console.credentials import hidden
from mft.console.screen import say
from mft.errors import UserError, refused_by_system
from mft.files.json_file import read_json, write_json
from mft.launch import launch, rank_log
from mft.launch.job import Job
from mft.launch.signals import INTERRUPTED, UNSAVED, Stopped, let_through
from mft.run_folder import RunStatus

if TYPE_CHECKING:
    from mft.training.trace import Trace


def supervise(
    job: Job,
    folder: Path,
    cores: list[int],
    gpus: list[str],
    environment: dict[str, str],
    trace: Trace | None = None,
) -> None:
    """Runs one job in ranks of this process; exits with 0, 1 (failed: log/failure.json) or a rank's code."""
    let_through()
    os.setsid()  # a Ctrl-C of the terminal reaches the sweep alone, which forwards it once
    os.environ.update(environment)  # the fork server has that of the sweep's start
    rank_log.redirect(folder / "log" / "output.txt")
    if cores:
        os.sched_setaffinity(0, cores)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    threading.Thread(target=_end_with_sweep, daemon=True, name="watchdog").start()
    try:
        launch.launch(job, folder, trace=trace)
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None
    except KeyboardInterrupt:  # before the ranks were up
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        leave_failure(folder, error)
        raise SystemExit(1) from None


def leave_failure(folder: Path, error: Exception) -> None:
    """Writes why a job failed to its folder: log/failure.json (a sentence, and whether it is a UserError's),
    log/traceback.txt, and status failed."""
    # a WorkerError has both; the traceback of this process shows nothing of the rank's
    trace = getattr(error, "traceback", "") or "".join(traceback.format_exception(error))
    user = isinstance(error, UserError)
    sentence = getattr(error, "sentence", "") or (str(error) if user else f"{type(error).__name__}: {error}")
    sentence = hidden(str(refused_by_system(error) or sentence))
    log = folder / "log"
    with suppress(OSError):  # the disk that ended the job may be full
        log.mkdir(parents=True, exist_ok=True)
        write_json(log / "failure.json", {"sentence": sentence, "user": user, "time": time.time()})
        summary = read_json(folder / "summary.json")
        write_json(folder / "summary.json", summary | {"status": RunStatus.failed, "error": sentence})
        (log / "traceback.txt").write_text(hidden(trace), encoding="utf-8")
    say(f"mft: this job failed: {error}", sys.stderr)


def _end_with_sweep() -> None:
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os._exit(UNSAVED)
