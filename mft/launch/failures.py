"""The report a rank writes when it fails, and which of several failures caused the others.

`log/rank<r>.error.json` in the run folder is written by the rank itself, or, for a rank that was killed, by
the process that started it; `log/host<n>.error.json` by host n when another host is gone.
"""

from __future__ import annotations

import re
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mft.console import credentials, screen
from mft.distributed.stalled import TIMED_OUT, Stalled
from mft.errors import UserError
from mft.files.disk import free_bytes
from mft.files.json_file import Values, read_json, write_json
from mft.launch.out_of_memory import planned

FULL = 2**16
"""Bytes free on a disk below which a rank without a report is assumed to have found the disk full."""

CAUSE_SECONDS = 5.0
"""How long to wait for the report of the cause, while all reports are of broken connections."""

ROOT, HOST_GONE, STALLED, LOST_CONNECTION = 0, 1, 2, 3
"""How far a failure is from the cause: a rank's own failure; a host that is gone, whose ranks cannot report
any more; a rank that waited in vain for another one; a rank that only lost its connection to another one,
which is the cause."""

BROKEN = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|failed to connect|remote process exited|NCCL|Gloo",
    re.IGNORECASE,
)
"""The texts of errors that mean a lost connection."""


class HostGone(UserError):
    """Other hosts of the run have stopped sending heartbeats."""

    hosts: Sequence[int] = ()
    """Their numbers."""


LostHosts = Callable[[float], HostGone | None]
"""Seconds → the error about the hosts that were silent for so long."""


class WorkerError(Exception):
    """A defect, or a failure of the machine, in a rank: `sentence` says which; `traceback` is that rank's."""

    def __init__(self, sentence: str, traceback: str = ""):
        super().__init__(sentence, traceback)
        self.sentence = sentence
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.traceback.rstrip()}\n\n{self.sentence}" if self.traceback else self.sentence


def write_report(path: Path, error: BaseException, rank: int, **more: Any) -> None:
    """Writes what failed as JSON: type, message, traceback, rank, time (seconds since 1970), user (a
    UserError)."""
    report = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "message": credentials.hidden(str(error)),
        "user": isinstance(error, UserError),
        "stalled": vars(error) if isinstance(error, Stalled) else None,
        "traceback": credentials.hidden("".join(traceback.format_exception(error))),
    }
    write_json(path, report | more)


def forget_failures(reports: Path) -> None:
    """Removes the error reports of an earlier attempt."""
    reports.mkdir(parents=True, exist_ok=True)
    for old in reports.glob("*.error.json"):
        old.unlink()


def render_failure(error: BaseException, rank: int) -> str:
    """Returns the text for the terminal: a UserError's sentence, or a traceback and the rank's number."""
    if isinstance(error, UserError):
        return screen.shown(f"mft: {error}")
    return screen.shown(WorkerError(_sentence(rank, error), "".join(traceback.format_exception(error))))


def is_root_cause(report: Path, since: float) -> bool:
    """Whether a rank's report is of a cause, and no other rank has reported one since then."""
    others = [path for path in report.parent.glob("*.error.json") if path != report]
    own = _read(report)
    return bool(own) and causal_distance(own) == ROOT and all(p.stat().st_mtime < since for p in others)


def cause_elsewhere(report: Path, since: float) -> Exception | None:
    """Returns the error of another rank where this one (with its report) only lost its connection, else
    None."""
    # the connection may break before the failed rank has written its report
    own, deadline = _read(report), time.monotonic() + CAUSE_SECONDS
    while own and causal_distance(own) == LOST_CONNECTION and time.monotonic() < deadline:
        for other in reports_in(report.parent):
            if other["time"] >= since and causal_distance(other) < LOST_CONNECTION:
                return _error_of(other)
        time.sleep(0.2)
    if own and causal_distance(own) == STALLED:
        time.sleep(CAUSE_SECONDS / 2)  # other ranks, too, report that they waited in vain
        reports = [other for other in reports_in(report.parent) if other["time"] >= since]
        return _stalled(own, reports)
    return None


def failure_of(
    log: Path, ranks: range, codes: dict[int, int], host: int | None = None, lost: LostHosts | None = None
) -> Exception:
    """Returns the error of the rank that failed first, from its report, or from its exit code when it left
    none.

    ranks: those of this machine; codes: exit codes of those that failed; host, lost: with several hosts, the
    number of this one and what is known of the others.
    """
    reports = reports_in(log, host)
    # a rank may exit with a code but no report: killed by a signal, or on a full disk
    silent = sorted(set(ranks) - {report["rank"] for report in reports})
    if lost is not None and not any(codes.get(rank, 0) < 0 for rank in silent):
        # no rank was killed here, so the cause is in a report, possibly still on its way from another host,
        # or that host is gone
        deadline = time.monotonic() + CAUSE_SECONDS
        while _only_lost(reports) and time.monotonic() < deadline:
            time.sleep(0.2)
            reports = reports_in(log, host)
        if _only_lost(reports) and (gone := lost(CAUSE_SECONDS - 1)):
            return gone
    # a rank without a report was killed: it, not a report of a lost connection, is the cause
    if reports and causal_distance(reports[0]) == STALLED:
        return _stalled(reports[0], reports)
    if reports and not (silent and _only_lost(reports)):
        return _error_of(reports[0])
    rank = next((rank for rank in silent if codes.get(rank)), silent[0] if silent else 0)
    return _silent_death(log, rank, codes.get(rank), len(ranks))


def _only_lost(reports: list[Values]) -> bool:
    return not reports or causal_distance(reports[0]) == LOST_CONNECTION


def _stalled(report: Values, reports: list[Values]) -> Stalled:
    """Returns the error of a rank that waited in vain.

    Where it cannot tell for which, the error names those that have reported nothing, not even that they
    waited, too.
    """
    facts = report.part("stalled")
    reported = {other["rank"] for other in reports}
    ranks = facts["ranks"] or [rank for rank in range(facts["world"]) if rank not in reported]
    return Stalled(ranks, facts["since"], facts["limit"], facts["silent"], facts["world"])


def _silent_death(log: Path, rank: int, code: int | None, ranks: int) -> Exception:
    """Returns the error of a rank that left no report. code: its exit code, negative for a signal, None
    where it is unknown."""
    if code is None or code == -signal.SIGKILL:
        return UserError(
            f"Rank {rank} was killed from outside, probably because the machine's memory ran out. Lower "
            "train.per_device_batch_size or data.seq_length, or start fewer ranks (launch.nproc, now "
            f"{ranks}). {planned(log.parent)}"
        )
    if code > 0 and (free := free_bytes(log)) < FULL:
        return UserError(
            f"The disk is full: rank {rank} could not even write its error report to {log} ({free:,} bytes "
            "free). Make room; the same command then resumes."
        )
    if code == -signal.SIGABRT and _shows_timeout(log / f"rank{rank}.log"):
        return UserError(
            f"A collective timed out in rank {rank}, as one does after dist.timeout_minutes: another rank "
            f"has stalled. The stacks of all ranks that still ran are in {log}/rank<r>.log. What was saved "
            "is intact: the same command resumes."
        )
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return WorkerError(f"rank {rank} {how} without a report; its output is in {log}.")


def _shows_timeout(log: Path) -> bool:
    """Whether the end of a rank's log has what NCCL's watchdog says before it aborts the process."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 2**20))
            return bool(TIMED_OUT.search(file.read().decode(errors="replace")))
    except OSError:
        return False


def reports_in(log: Path, host: int | None = None) -> list[Values]:
    """Returns the error reports of ranks and hosts, the one nearest to the cause first, then the oldest.

    host: this host's number; reports that declare this very host gone are left out: they come from the other
    side of a broken cable.
    """
    reports = [_read(path) for path in sorted(log.glob("*.error.json"))]
    reports = [report for report in reports if report and host not in report.get("gone", ())]
    return sorted(reports, key=lambda report: (causal_distance(report), report["time"]))


def _read(path: Path) -> Values:
    """Returns an error report, {} for one that is incomplete."""
    report = read_json(path)
    complete = report.text("type") and report.number("time") and {"rank", "message", "user"} <= set(report)
    return report if complete else Values()


def causal_distance(report: Values) -> int:
    """Returns ROOT, HOST_GONE, STALLED or LOST_CONNECTION."""
    known = {HostGone.__name__: HOST_GONE, Stalled.__name__: STALLED}
    if report["type"] in known:
        return known[report["type"]]
    # torch's DistBackendError, DistNetworkError, …; gloo and MPI raise a bare RuntimeError
    return LOST_CONNECTION if report["type"].startswith("Dist") or BROKEN.search(report["message"]) else ROOT


def _error_of(report: Values) -> Exception:
    if report["user"]:
        return UserError(report["message"])
    return WorkerError(_sentence(report["rank"], report["message"], report["type"]), report["traceback"])


def _sentence(rank: int, error: object, kind: str = "") -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"rank {rank} failed: {kind or type(error).__name__}: {first_line}"
