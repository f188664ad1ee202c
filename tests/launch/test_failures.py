"""Which of several failures is the cause, from the reports that ranks leave."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mft.distributed.stalled import Stalled
from mft.errors import UserError
from mft.files.json_file import Values, read_json, write_json
from mft.launch import failures
from mft.launch.failures import (
    HOST_GONE,
    LOST_CONNECTION,
    ROOT,
    STALLED,
    HostGone,
    WorkerError,
    causal_distance,
    cause_elsewhere,
    failure_of,
    forget_failures,
    is_root_cause,
    render_failure,
    reports_in,
    write_report,
)

LOST = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:3000")


class DistBackendError(RuntimeError):
    """Named as torch's own."""


def write(log: Path, rank: int, error: BaseException, seconds: float = 0.0) -> Path:
    """Leaves the report of a rank, as written so many seconds after now."""
    path = log / f"rank{rank}.error.json"
    write_report(path, error, rank)
    write_json(path, read_json(path) | {"time": time.time() + seconds})
    return path


@pytest.mark.parametrize(
    ("error", "distance"),
    [
        (ValueError("shapes differ"), ROOT),
        (UserError("data.paths: /nowhere does not exist"), ROOT),
        (LOST, LOST_CONNECTION),
        (RuntimeError("Broken pipe"), LOST_CONNECTION),
        (DistBackendError("anything"), LOST_CONNECTION),
        (RuntimeError("NCCL communicator was aborted on rank 1"), LOST_CONNECTION),
    ],
)
def test_a_lost_connection_is_further_from_the_cause_than_a_failure(error: Exception, distance: int) -> None:
    assert ROOT < HOST_GONE < STALLED < LOST_CONNECTION
    stalled = Stalled([], 0.0, "dist.timeout_minutes=1", silent=False, world=2)
    for kind, expected in ((error, distance), (HostGone("host 1 is gone"), HOST_GONE), (stalled, STALLED)):
        report = Values({"type": type(kind).__name__, "message": str(kind)})
        assert causal_distance(report) == expected


def test_reports_are_ordered_by_their_distance_and_then_by_time(tmp_path: Path) -> None:
    write(tmp_path, 0, LOST, seconds=0)
    write(tmp_path, 1, ValueError("second"), seconds=3)
    write(tmp_path, 2, ValueError("first"), seconds=2)
    (tmp_path / "rank3.error.json").write_text('{"type": "cut off')
    assert [report["rank"] for report in reports_in(tmp_path)] == [2, 1, 0]


def test_a_host_that_was_cut_off_does_not_take_itself_for_gone(tmp_path: Path) -> None:
    write_report(tmp_path / "host0.error.json", HostGone("host 1 is gone"), rank=-1, time=1.0, gone=[1])
    assert len(reports_in(tmp_path, host=0)) == len(reports_in(tmp_path)) == 1
    assert not reports_in(tmp_path, host=1)


def test_the_rank_that_failed_first_is_the_failure_of_all(tmp_path: Path) -> None:
    write(tmp_path, 0, LOST)
    write(tmp_path, 1, ValueError("the cause\nand a second line"), seconds=2)
    failure = failure_of(tmp_path, range(2), {0: 1, 1: 1})
    assert isinstance(failure, WorkerError) and failure.sentence == "rank 1 failed: ValueError: the cause"
    write(tmp_path, 1, UserError("data.paths: /nowhere does not exist"))
    failure = failure_of(tmp_path, range(2), {0: 1, 1: 1})
    assert isinstance(failure, UserError) and str(failure) == "data.paths: /nowhere does not exist"


@pytest.mark.parametrize(
    ("known", "waiting", "sentence"),
    [
        ([2], [0], "rank 2 has stalled: other ranks have waited in vain since 20"),
        ([], [0, 2, 3], "rank 1 has stalled: other ranks have waited in vain since 20"),
        ([], [0, 3], "ranks 1 and 2 have stalled: "),
        ([], [0, 1, 2, 3], "a rank has stalled: "),
    ],
)
def test_who_reports_nothing_has_stalled_where_nobody_can_tell(
    tmp_path: Path, known: list[int], waiting: list[int], sentence: str
) -> None:
    error = Stalled(known, time.time(), "dist.timeout_minutes=0.1", silent=False, world=4)
    for rank in waiting:
        write(tmp_path, rank, LOST if rank == 3 else error)
    failure = failure_of(tmp_path, range(4), {0: 1, 1: 1})
    assert isinstance(failure, UserError) and str(failure).startswith(sentence)
    assert "longer than dist.timeout_minutes=0.1. The stacks" in str(failure)


def test_an_abort_by_nccl_is_a_collective_that_timed_out(tmp_path: Path) -> None:
    words = "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"
    (tmp_path / "rank1.log").write_text(f"[rank1]:[E ProcessGroupNCCL.cpp:632] {words}\n")
    failure = failure_of(tmp_path, range(2), {1: -signal.SIGABRT})
    assert isinstance(failure, UserError)
    assert "A collective timed out in rank 1, as one does after dist.timeout_minutes" in str(failure)
    assert isinstance(
        failure_of(tmp_path, range(2), {0: -signal.SIGABRT}), WorkerError
    )  # it does not say why


@pytest.mark.parametrize(
    ("code", "kind", "sentence"),
    [
        (
            -signal.SIGKILL,
            UserError,
            "Rank 1 was killed from outside, probably because the machine's memory ran out",
        ),
        (-signal.SIGSEGV, WorkerError, "rank 1 died of SIGSEGV without a report"),
        (3, WorkerError, "rank 1 exited with code 3 without a report"),
    ],
)
def test_a_rank_without_a_report_is_the_cause_of_lost_connections(
    tmp_path: Path, code: int, kind: type[Exception], sentence: str
) -> None:
    write(tmp_path, 0, LOST)
    failure = failure_of(tmp_path, range(2), {0: 1, 1: code})
    assert isinstance(failure, kind) and str(failure).startswith(sentence)


def test_a_full_disk_is_recognised_where_not_even_a_report_could_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "FULL", 2**63)
    assert "The disk is full: rank 0" in str(failure_of(tmp_path, range(1), {0: 1}))


def test_a_root_cause_is_the_only_report_since_the_start(tmp_path: Path) -> None:
    old, own = (
        write(tmp_path, 0, ValueError("of an earlier attempt")),
        write(tmp_path, 1, ValueError("the cause")),
    )
    os.utime(old, (1, 1))
    assert is_root_cause(own, since=2)
    write(tmp_path, 0, ValueError("of this one"))
    assert not is_root_cause(own, since=2)
    old.unlink()
    write(tmp_path, 1, LOST)
    assert not is_root_cause(own, since=2)


def test_a_rank_that_lost_its_connection_reports_the_cause_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, since = write(tmp_path, 0, LOST), time.time() - 1
    write(tmp_path, 1, ValueError("the cause"))
    assert "rank 1 failed: ValueError: the cause" in str(cause_elsewhere(own, since))
    write(tmp_path, 0, ValueError("its own"))
    assert cause_elsewhere(own, since) is None
    monkeypatch.setattr(failures, "CAUSE_SECONDS", 0.0)
    write(tmp_path, 0, LOST)
    assert cause_elsewhere(own, since=time.time() + 10) is None  # what there is comes from an earlier attempt


def test_what_a_person_reads_and_what_an_earlier_attempt_left(tmp_path: Path) -> None:
    assert render_failure(UserError("name=…: wrong"), 1) == "mft: name=…: wrong"
    assert render_failure(ValueError("wrong"), 1).endswith(
        "ValueError: wrong\n\nrank 1 failed: ValueError: wrong"
    )
    write(tmp_path / "log", 1, ValueError("of an earlier attempt"))
    forget_failures(tmp_path / "log")
    assert not list((tmp_path / "log").iterdir())
