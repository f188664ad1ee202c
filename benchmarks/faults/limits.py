"""Kinds of faults: a clock that jumps, and too few file handles, too small files."""

from __future__ import annotations

import functools
import os
import resource
import time

from benchmarks.faults import damages
from benchmarks.faults.case import Case

YEAR = 365 * 24 * 3600


def clock(case: Case) -> None:
    """The clock jumps between two commands, by a minute to two years, back or ahead.

    The process that resumes reads another time.time(); the files of the run get times of any age.
    """
    damages.killed(case)
    jump = case.draw.choice([-1, 1]) * case.draw.choice([60, 24 * 3600, 2 * YEAR])
    for path in damages.files(case.run):
        other = path.stat().st_mtime + case.draw.choice([-1, 0, 1]) * case.draw.uniform(0, 2 * YEAR)
        os.utime(path, (other, other))
    case.strike(f"the clock jumped by {jump:,} s, and files have other times")
    case.end(case.start(prepare=functools.partial(shift_clock, jump)))


def shift_clock(seconds: float) -> None:
    """Makes time.time() and time.time_ns() of this process and its forks read another time."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + seconds
    time.time_ns = lambda: real_ns() + int(seconds * 1e9)


def handles(case: Case) -> None:
    """Only a few files may be open at once."""
    limit = case.draw.randint(12, 120)
    case.strike(f"at most {limit} open files")
    _limited(case, resource.RLIMIT_NOFILE, limit, "[Tt]oo many open files")


def file_size(case: Case) -> None:
    """No file may become longer than so many bytes, as quotas have it."""
    limit = case.draw.randint(50_000, 700_000)  # what is printed goes to a file, too, of some 20,000 bytes
    case.strike(f"files of at most {limit:,} bytes")
    _limited(case, resource.RLIMIT_FSIZE, limit, "[Ff]ile too large")


def _limited(case: Case, what: int, limit: int, said: str) -> None:
    if case.end(case.start(prepare=functools.partial(limit_to, what, limit)), anything=True):
        case.expects.append(said)


def limit_to(what: int, limit: int) -> None:
    """Sets a resource limit of this process and its forks."""
    resource.setrlimit(what, (limit, limit))
