"""What a rank leaves when it fails, and which of several failures is the cause of the others.

`log/rank<r>.error.json` in the run folder is written by the rank itself, or for a rank that died without a word by the
process that started it; `log/host<n>.error.json` by host n when it misses another one.
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
    from mft.launch.hosts import Hosts

FULL = 2**16
"""Bytes free on a disk below which a rank that left no report is taken to have found it full."""

CAUSE_SECONDS = 5.0
"""How long those whose connections broke wait for the cause to show, in another rank or on another host."""


class WorkerError(Exception):
    """A defect, or a failure of the machine, in a rank: `sentence` says which; `traceback` is that rank's."""

    def __init__(self, sentence: str, traceback: str = ""):
        super().__init__(sentence, traceback)
        self.sentence = sentence
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.traceback.rstrip()}\n\n{self.sentence}" if self.traceback else self.sentence


def write_report(path: Path, error: BaseException, rank: int) -> None:
    """Writes what failed as JSON: type, message, traceback, rank, time (seconds since 1970), user (a UserError)."""
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


def told(error: BaseException, rank: int) -> str:
    """Returns what a person reads about a rank's failure: a UserError's sentence, or a traceback and whose it is."""
    if isinstance(error, UserError):
        return shown(f"mft: {error}")
    return shown(WorkerError(_sentence(rank, error), "".join(traceback.format_exception(error))))


def is_the_first(report: Path, since: float) -> bool:
    """Whether a rank's report is of a cause, and there is none of another rank (written after `since`)."""
    others = [path for path in report.parent.glob("*.error.json") if path != report and path.stat().st_mtime >= since]
    own = _read(report)
    return not others and bool(own) and _how_far_from_the_cause(own) == 0


def cause_elsewhere(report: Path, since: float) -> Exception | None:
    """Returns what another rank failed of, if this one (with its report) only lost its connection; else None."""
    own, end = _read(report), time.monotonic() + CAUSE_SECONDS
    while own and _how_far_from_the_cause(own) == 2 and time.monotonic() < end:
        first = next((r for r in reports_in(report.parent) if r["time"] >= since and r["rank"] != own["rank"]), None)
        if first and _how_far_from_the_cause(first) < 2:
            return _error_of(first)
        time.sleep(0.2)
    return None


def failure_of(reports: Path, ranks: range, codes: dict[int, int], hosts: Hosts | None = None) -> Exception:
    """Returns the error of the rank that failed first, from its report, or from its exit code when it left none.

    ranks: those of this machine. With several hosts the cause may be on another one, and its report takes a moment.
    """
    found = reports_in(reports, hosts)
    silent = sorted(set(ranks) - {report["rank"] for report in found})
    if hosts is not None and not any(codes.get(rank, 0) < 0 for rank in silent):
        end = time.monotonic() + CAUSE_SECONDS
        while not (found and _how_far_from_the_cause(found[0]) < 2) and time.monotonic() < end:
            time.sleep(0.2)
            found = reports_in(reports, hosts)
        if (not found or _how_far_from_the_cause(found[0]) == 2) and (gone := hosts.gone(CAUSE_SECONDS - 1)):
            return UserError(hosts.sentence(gone))
    lost = bool(found) and _how_far_from_the_cause(found[0]) == 2
    if found and not (lost and silent):
        return _error_of(found[0])
    rank = next((rank for rank in silent if codes.get(rank)), silent[0] if silent else 0)
    code = codes.get(rank)
    if code is None or code == -signal.SIGKILL:
        return UserError(
            f"Rank {rank} was killed from outside, probably because the machine's memory ran out. Lower "
            f"train.per_device_batch_size or data.seq_length, or start fewer ranks (launch.nproc, now {len(ranks)})."
        )
    if code > 0 and (left := shutil.disk_usage(reports).free) < FULL:
        return UserError(
            f"The disk is full: rank {rank} could not even write what it failed of into {reports} ({left:,} bytes were "
            "free). Make room; the same command then resumes."
        )
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    return WorkerError(f"rank {rank} {how} without a word; its output is in {reports}")


def reports_in(folder: Path, hosts: Hosts | None = None) -> list[dict[str, Any]]:
    """Returns the error reports of ranks and hosts, the one nearest to the cause first.

    Without those that take this very host for gone: it was cut off, and knows better.
    """
    found = [_read(path) for path in sorted(folder.glob("*.error.json"))]
    told = [r for r in found if r and not (hosts and hosts.rank in r.get("gone", ()))]
    return sorted(told, key=lambda report: (_how_far_from_the_cause(report), report["time"]))


def _read(path: Path) -> dict[str, Any]:
    """Returns an error report, {} for one that is not whole."""
    report = read_json(path)
    whole = report.text("type") and report.number("time") is not None and {"rank", "message", "user"} <= set(report)
    return report if whole else {}


def _how_far_from_the_cause(report: dict[str, Any]) -> int:
    """Returns 0 for a failure of a rank, 1 for a host that is gone, 2 for a rank that only lost its connection.

    Of that, another rank is the cause.
    """
    if report["type"] == "HostGone":
        return 1
    signs = r"Connection (closed|reset|refused)|Broken pipe|failed to connect|remote process exited|NCCL|Gloo"
    lost = report["type"].startswith("Dist") or re.search(signs, report["message"], re.IGNORECASE) is not None
    return 2 if lost else 0


def _error_of(report: dict[str, Any]) -> Exception:
    if report["user"]:
        return UserError(report["message"])
    return WorkerError(_sentence(report["rank"], report["message"], report["type"]), report["traceback"])


def _sentence(rank: int, error: object, kind: str = "") -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"rank {rank} failed: {kind or type(error).__name__}: {line}"
