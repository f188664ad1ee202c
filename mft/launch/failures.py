"""What a rank leaves when it fails, and which of several failures caused the others.

`log/rank<r>.error.json` in the run folder is written by the rank itself, or, for a rank that was killed, by
the process that started it; `log/host<n>.error.json` by host n when another host is gone.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.console.credentials import hidden
from mft.console.screen import shown
from mft.errors import UserError
from mft.files.json_file import read_json, write_json

if TYPE_CHECKING:
    from mft.launch.multinode import NodeGroup

FULL = 2**16
"""Bytes free on a disk below which a rank that left no report is taken to have found it full."""

CAUSE_SECONDS = 5.0
"""How long to wait for the report of the cause, where all that is known are broken connections."""

ROOT, HOST_GONE, LOST_CONNECTION = 0, 1, 2
"""How far a failure is from the cause: a rank's own failure; a host that is gone, whose ranks cannot report
any more; a rank that only lost its connection to another one, which is the cause."""

BROKEN = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|failed to connect|remote process exited|NCCL|Gloo",
    re.IGNORECASE,
)
"""What errors of a lost connection say."""


class WorkerError(Exception):
    """A defect, or a failure of the machine, in a rank: `sentence` says which; `traceback` is that rank's."""

    def __init__(self, sentence: str, traceback: str = ""):
        super().__init__(sentence, traceback)
        self.sentence = sentence
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.traceback.rstrip()}\n\n{self.sentence}" if self.traceback else self.sentence


def write_report(path: Path, error: BaseException, rank: int) -> None:
    """Writes what failed as JSON: type, message, traceback, rank, time (seconds since 1970), user (a
    UserError)."""
    write_json(
        path,
        {
            "rank": rank,
            "time": time.time(),
            "type": type(error).__name__,
            "message": hidden(str(error)),
            "user": isinstance(error, UserError),
            "traceback": hidden("".join(traceback.format_exception(error))),
        },
    )


def forget_failures(reports: Path) -> None:
    """Removes the error reports of an earlier attempt."""
    reports.mkdir(parents=True, exist_ok=True)
    for old in reports.glob("*.error.json"):
        old.unlink()


def render_failure(error: BaseException, rank: int) -> str:
    """Returns what a person reads about a rank's failure: a UserError's sentence, or a traceback and whose it
    is."""
    if isinstance(error, UserError):
        return shown(f"mft: {error}")
    return shown(WorkerError(_sentence(rank, error), "".join(traceback.format_exception(error))))


def is_root_cause(report: Path, since: float) -> bool:
    """Whether a rank's report is of a cause, and no other rank has reported one since then."""
    others = [
        path
        for path in report.parent.glob("*.error.json")
        if path != report and path.stat().st_mtime >= since
    ]
    own = _read(report)
    return not others and bool(own) and causal_distance(own) == ROOT


def cause_elsewhere(report: Path, since: float) -> Exception | None:
    """Returns what another rank failed of, if this one (with its report) only lost its connection; else
    None."""
    own, deadline = _read(report), time.monotonic() + CAUSE_SECONDS
    while own and causal_distance(own) == LOST_CONNECTION and time.monotonic() < deadline:
        first = next(
            (r for r in reports_in(report.parent) if r["time"] >= since and r["rank"] != own["rank"]), None
        )
        if first and causal_distance(first) < LOST_CONNECTION:
            return _error_of(first)
        time.sleep(0.2)
    return None


def failure_of(log: Path, ranks: range, codes: dict[int, int], nodes: NodeGroup | None = None) -> Exception:
    """Returns the error of the rank that failed first, from its report, or from its exit code when it left
    none.

    ranks: those of this machine. With several hosts the cause may be on another one, and its report takes a
    moment.
    """
    own_rank = nodes.rank if nodes else None
    reports = reports_in(log, own_rank)
    silent = sorted(set(ranks) - {report["rank"] for report in reports})
    if nodes is not None and not any(codes.get(rank, 0) < 0 for rank in silent):
        # no rank was killed here: the cause is in a report, here or on its way from another host, or that
        # host is gone
        deadline = time.monotonic() + CAUSE_SECONDS
        while _only_lost(reports) and time.monotonic() < deadline:
            time.sleep(0.2)
            reports = reports_in(log, own_rank)
        if _only_lost(reports) and (gone := nodes.gone(CAUSE_SECONDS - 1)):
            return UserError(nodes.lost(gone))
    # a rank without a report was killed: it, not a report of a lost connection, is the cause
    if reports and not (silent and _only_lost(reports)):
        return _error_of(reports[0])
    rank = next((rank for rank in silent if codes.get(rank)), silent[0] if silent else 0)
    return _silent_death(log, rank, codes.get(rank), len(ranks))


def _only_lost(reports: list[dict[str, Any]]) -> bool:
    return not reports or causal_distance(reports[0]) == LOST_CONNECTION


def _silent_death(log: Path, rank: int, code: int | None, ranks: int) -> Exception:
    """Returns the error of a rank that left an exit code (negative: a signal; None: not even that) and no
    report."""
    if code is None or code == -signal.SIGKILL:
        return UserError(
            f"Rank {rank} was killed from outside, probably because the machine's memory ran out. Lower "
            f"train.per_device_batch_size or data.seq_length, or start fewer ranks (launch.nproc, now "
            f"{ranks})."
        )
    if code > 0 and (left := shutil.disk_usage(log).free) < FULL:
        return UserError(
            f"The disk is full: rank {rank} could not even write what it failed of into {log} ({left:,} "
            "bytes were free). Make room; the same command then resumes."
        )
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return WorkerError(f"rank {rank} {how} without a report; its output is in {log}.")


def reports_in(log: Path, host: int | None = None) -> list[dict[str, Any]]:
    """Returns the error reports of ranks and hosts, the one nearest to the cause first, then the oldest.

    host: this host's number; reports that take this very host for gone are left out: it was cut off, and
    knows better.
    """
    reports = [_read(path) for path in sorted(log.glob("*.error.json"))]
    reports = [report for report in reports if report and host not in report.get("gone", ())]
    return sorted(reports, key=lambda report: (causal_distance(report), report["time"]))


def _read(path: Path) -> dict[str, Any]:
    """Returns an error report, {} for one that is incomplete."""
    report = read_json(path)
    complete = (
        report.text("type")
        and report.number("time") is not None
        and {"rank", "message", "user"} <= set(report)
    )
    return report if complete else {}


def causal_distance(report: dict[str, Any]) -> int:
    """Returns ROOT, HOST_GONE or LOST_CONNECTION."""
    if report["type"] == "HostGone":
        return HOST_GONE
    # torch's DistBackendError, DistNetworkError, …; gloo and MPI raise a bare RuntimeError
    return LOST_CONNECTION if report["type"].startswith("Dist") or BROKEN.search(report["message"]) else ROOT


def _error_of(report: dict[str, Any]) -> Exception:
    if report["user"]:
        return UserError(report["message"])
    return WorkerError(_sentence(report["rank"], report["message"], report["type"]), report["traceback"])


def _sentence(rank: int, error: object, kind: str = "") -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"rank {rank} failed: {kind or type(error).__name__}: {line}"
