"""A rank that stalls ends the run in bounded time, in a sentence that names it; the others leave their stacks."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from mft.errors import UserError
from mft.files.json_file import read_json
from mft.launch.signals import Stopped
from mft.launch.spawn import spawn
from tests import forked
from tests.distributed.runs import frozen, write_tasks
from tests.launch import entries

LIMIT = 6.0
"""dist.timeout_minutes=0.1 in seconds."""

AGENT = 30.0
"""Seconds that elastic's agent gives a rank to end, before it kills one that is stopped."""

PATIENCE = 120.0
"""Seconds until a test is given up."""

pytestmark = [pytest.mark.usefixtures("not_placed"), pytest.mark.slow, pytest.mark.dist]


def run_of(tmp_path: Path, *overrides: str) -> Path:
    data = f"data.paths=[{','.join(map(str, write_tasks(tmp_path / 'tasks')))}]"
    cache = f"cache_dir={tmp_path / 'cache'}"
    settings = ("launch.nproc=2", "dist.timeout_minutes=0.1", "train.eval_every=null", *overrides)
    return frozen(tmp_path / "run", [data, cache, "dist=ddp", *settings])


def logged(run_dir: Path) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") > 2


class Act(threading.Thread):
    """Does something to a rank, or to this process, once the run is as far."""

    def __init__(self, run_dir: Path, ready: Callable[[Path], bool], act: Callable[[dict[int, int]], None]):
        """act: gets the process ids by rank."""
        super().__init__(daemon=True)
        self.run_dir, self.ready, self.act = run_dir, ready, act
        self.pids: dict[int, int] = {}
        self.at = 0.0
        self.start()

    def run(self) -> None:
        until = time.monotonic() + PATIENCE
        while not self.ready(self.run_dir):
            assert time.monotonic() < until, f"{self.run_dir} never came so far"
            time.sleep(0.05)
        self.pids = {rank: int((self.run_dir / f"ready{rank}").read_text()) for rank in (0, 1)}
        self.at = time.monotonic()
        self.act(self.pids)


def ended(run_dir: Path, entry: Callable[[str], None], acting: Act) -> tuple[str, float]:
    """Returns the sentence that a run ended with, and how many seconds after the act; no process is left."""
    with pytest.raises(UserError) as caught:
        spawn(entry, (str(run_dir),), 2, run_dir / "log")
    seconds = time.monotonic() - acting.at
    alive = [pid for pid in acting.pids.values() if psutil.pid_exists(pid)]
    assert not [pid for pid in alive if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    return str(caught.value), seconds


def stop_until_the_other_has_ended(pids: dict[int, int]) -> None:
    """Kills the stopped rank in the end, as the agent would half a minute later: see AGENT."""
    other, until = psutil.Process(pids[0]), time.monotonic() + PATIENCE
    os.kill(pids[1], signal.SIGSTOP)
    with contextlib.suppress(psutil.NoSuchProcess):
        while other.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
            time.sleep(0.05)
    time.sleep(2.0)  # so that the agent sees the other one's end first
    os.kill(pids[1], signal.SIGKILL)


def stop_a_rank(root: Path, sending: Connection) -> None:
    forked.as_started_by_hand()
    run_dir = run_of(root, "train.max_steps=100000")
    acting = Act(run_dir, logged, stop_until_the_other_has_ended)
    sending.send((run_dir, *ended(run_dir, entries.train, acting)))


@pytest.fixture(scope="module", autouse=True)
def stopped_in_a_step(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """Tells how a run ended of which a rank was stopped in a step: beside the other tests, since all of them
    wait."""
    receiving, sending = forked.CONTEXT.Pipe(duplex=False)
    process = forked.CONTEXT.Process(target=stop_a_rank, args=(tmp_path_factory.mktemp("stopped"), sending))
    process.start()
    sending.close()  # so that the end of the process is the end of what can be received
    yield receiving
    process.kill()
    process.join(PATIENCE)


@pytest.mark.long
def test_a_rank_that_is_stopped_while_it_saves(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, "train.max_steps=100000", "train.save_every=2")
    saving = lambda folder: (folder / "saving").exists()  # noqa: E731
    acting = Act(run_dir, saving, lambda pids: os.kill(pids[0], signal.SIGSTOP))
    sentence, seconds = ended(run_dir, entries.save_slowly, acting)
    assert "rank 0 has stalled: no sign of life since 20" in sentence
    assert seconds < LIMIT + AGENT + 15
    log = (run_dir / "log" / "rank1.log").read_text()
    assert "Stacks of this rank, since rank 0 has stalled" in log and "wait_for_all" in log


def test_a_rank_that_lives_but_does_not_come(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, "train.max_steps=100000")
    acting = Act(run_dir, lambda folder: (folder / "ready1").exists(), lambda pids: None)
    sentence, _ = ended(run_dir, entries.deadlock, acting)
    assert "rank 1 has stalled: other ranks have waited in vain since 20" in sentence
    assert "in deadlocked" in (run_dir / "log" / "rank1.log").read_text()


def test_ctrl_c_while_a_rank_waits_for_a_slow_save(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, "train.max_steps=100000", "train.save_every=2")
    saving = lambda folder: (folder / "saving").exists()  # noqa: E731
    Act(run_dir, saving, lambda pids: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped):
        spawn(entries.save_for_a_while, (str(run_dir),), 2, run_dir / "log")
    assert read_json(run_dir / "summary.json").text("status") == "stopped"
    assert not list((run_dir / "log").glob("*.error.json"))


def test_a_rank_that_is_stopped_in_a_step(stopped_in_a_step: Connection) -> None:
    assert stopped_in_a_step.poll(PATIENCE), "the run did not end"
    run_dir, sentence, seconds = stopped_in_a_step.recv()
    assert "rank 1 has stalled: no sign of life since 20" in sentence
    assert "longer than dist.timeout_minutes=0.1" in sentence and "log/rank<r>.log" in sentence
    assert seconds < LIMIT + 15
    log = (run_dir / "log" / "rank0.log").read_text()
    assert "Stacks of this rank, since rank 1 has stalled" in log and "Timed out waiting" in log
    assert read_json(run_dir / "summary.json").text("status") == "failed"
