"""Ranks from the real fork server, with real signals; they run stand-ins of tests/launch/entries.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mft.errors import UserError
from mft.launch.failures import WorkerError
from mft.launch.signals import Stopped, exit_code
from mft.launch.spawn import loopback, spawn
from tests import forked
from tests.launch import entries
from tests.selection import long

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("not_placed")


def run(folder: Path, entry: Callable[[str], None], nproc: int = 2) -> None:
    spawn(entry, (str(folder),), nproc, folder / "log")


@pytest.mark.slow
@pytest.mark.dist
def test_every_rank_runs_and_the_next_job_is_forked_from_the_same_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path, entries.report)
    (earlier,) = {json.loads((tmp_path / f"rank{rank}.json").read_text())["parent"] for rank in (0, 1)}
    monkeypatch.setenv("MFT_TEST", "set after the fork server came up")
    monkeypatch.setenv("MASTER_ADDR", "of a batch script")
    run(tmp_path, entries.report)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["parent"] == second["parent"] == earlier != os.getpid()
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"]) == ("0", "1", "2")
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MFT_TEST"] == "set after the fork server came up"
    assert "printed by rank 1" in (tmp_path / "log" / "rank1.log").read_text()
    assert (tmp_path / "log" / "rank0.log").read_text().count("printed by rank 0") == 2
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.dist
def test_the_rank_that_failed_first_is_reported(tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        run(tmp_path, entries.fail)
    assert caught.value.sentence == "rank 1 failed: ValueError: this is the cause"
    assert "tests/launch/entries.py" in caught.value.traceback and "_together" in caught.value.traceback
    assert json.loads((tmp_path / "log" / "rank1.error.json").read_text())["type"] == "ValueError"
    run(tmp_path, entries.report)
    assert not list((tmp_path / "log").glob("*.error.json"))


@pytest.mark.slow
@pytest.mark.dist
def test_a_mistake_found_in_a_worker_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.paths: /nowhere does not exist$"):
        run(tmp_path, entries.refuse)


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_rank_is_distinguished_from_the_ranks_that_lost_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"Rank 1 was killed from outside, probably because .* memory ran out"
    ):
        run(tmp_path, entries.be_killed)


def launching(args: list[str]) -> None:
    """Launches ranks of an entry, as the job of a sweep does. args: its folder, entry, number of ranks, seconds."""
    path, entry, nproc, seconds = args
    folder = Path(path)
    try:
        spawn(getattr(entries, entry), (path,), int(nproc), folder / "log", int(seconds))
    except Stopped as stopped:
        sys.exit(exit_code(folder, stopped.signum))


TYPED = """
import sys
from mft.launch.spawn import start_fork_server
from tests.launch.test_spawn import launching
start_fork_server(('mft.launch.worker', 'torch'))
launching(sys.argv[1:])
"""


def in_a_process(
    tmp_path: Path, entry: str, nproc: int = 2, seconds: int = 600, typed: bool = False
) -> subprocess.Popen[str] | forked.Command:
    """Starts a launching process and waits until its ranks are at work.

    typed: one of its own, with a fork server; else it comes from a server and forks its ranks from itself.
    """
    args = [str(tmp_path), entry, str(nproc), str(seconds)]
    process: subprocess.Popen[str] | forked.Command
    if typed:
        command, pipe = [sys.executable, "-c", TYPED, *args], subprocess.PIPE
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    else:
        process = forked.Command(REPOSITORY, args, os.environ, main=launching)
    end = time.monotonic() + 60
    while sum(1 for _ in tmp_path.glob("ready*")) < nproc:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate(timeout=60)[0])
        time.sleep(0.05)
    return process


def workers(tmp_path: Path) -> list[psutil.Process]:
    return [psutil.Process(int(path.read_text())) for path in sorted(tmp_path.glob("ready*"))]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("entry", "signum", "code", "typed"),
    [
        ("until_stopped", signal.SIGTERM, 75, True),
        ("until_stopped", signal.SIGINT, 130, False),
        ("signalled_at_its_end", signal.SIGTERM, 0, False),
        ("uneven", signal.SIGTERM, 143, False),
        long("until_stopped", signal.SIGINT, 130, True),
    ],
)
def test_a_signal_lets_workers_save_and_says_so_in_the_exit_code(
    tmp_path: Path, entry: str, signum: int, code: int, typed: bool
) -> None:
    process = in_a_process(tmp_path, entry, typed=typed)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    assert output == ""
    status = "finished" if code == 0 else "stopped"
    assert (status in (tmp_path / "summary.json").read_text()) if code != 143 else True
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_is_not_lost_that_comes_while_ranks_are_forked(tmp_path: Path) -> None:
    # Python drops what a signal's handler raises inside a hook of a fork, such as logging's
    code = f"""if True:
        import multiprocessing, os, signal
        from pathlib import Path
        from mft.launch.signals import Stopped
        from mft.launch.spawn import spawn
        from tests.launch import entries

        def supervise():
            os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGTERM))
            try:
                spawn(entries.until_stopped, ({str(tmp_path)!r},), 1, Path({str(tmp_path)!r}) / "log")
            except Stopped as stopped:
                raise SystemExit(stopped.signum)

        process = multiprocessing.get_context("fork").Process(target=supervise)
        process.start()
        process.join(60)
        raise SystemExit(process.exitcode)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=90)
    assert done.returncode == signal.SIGTERM
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.slow
@pytest.mark.dist
def test_workers_that_do_not_listen_are_ended_after_shutdown_seconds(tmp_path: Path) -> None:
    process = in_a_process(tmp_path, "deaf", seconds=1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("how", ["kill -9", long("second Ctrl-C")])
def test_no_worker_outlives_the_process_that_launched_it(tmp_path: Path, how: str) -> None:
    process = in_a_process(tmp_path, "deaf", typed=True)
    server = workers(tmp_path)[0].parent()
    if how == "kill -9":
        process.kill()
    else:
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + 5  # before anybody reaps the process: as a zombie it still has its pid
    while any(map(alive, pids(tmp_path))):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.1)
    process.communicate(timeout=5)
    assert process.returncode == (-signal.SIGKILL if how == "kill -9" else 130)
    assert server is not None and not psutil.wait_procs([server], timeout=5)[1]


def pids(tmp_path: Path) -> list[int]:
    return [int(path.read_text()) for path in tmp_path.glob("ready*")]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.long  # tests/launch/test_placed.py starts a whole run so
def test_placed_ranks_receive_what_rank_0_broadcasts(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom mft.distributed.ddp import Ddp\n"
        "from mft.launch.placement import broadcast_from_rank0\n"
        "for time in range(2):\n    assert broadcast_from_rank0([time, os.environ['RANK']]) == [time, '0']\n"
        "Ddp().start('fp32', cpu=True).close()\n"
        "open(os.path.join(sys.argv[1], 'done' + os.environ['RANK']), 'w').close()\n"
    )
    (tmp_path / "ranks.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "ranks.py"), str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("done*"))) == 2


def test_launching_is_importable_without_torch() -> None:
    code = (
        "import sys, mft.launch.spawn, mft.launch.worker\nassert 'omegaconf' not in sys.modules\n"
        "import mft.launch.launch\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0


def test_the_store_of_the_ranks_is_reached_over_loopback_alone() -> None:
    info = loopback()
    port = info.bootstrap_store_info.master_port
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_to_the_whole_group_does_not_reach_the_fork_server(tmp_path: Path) -> None:
    code = (
        "import multiprocessing.forkserver as server, os, signal, sys\nfrom pathlib import Path\n"
        "from mft.launch.spawn import spawn, start_fork_server\nfrom tests.launch import entries\n"
        "start_fork_server(('mft.launch.worker', 'torch'))\n"  # whose imports are under way when it comes
        "for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
        "    os.kill(server._forkserver._forkserver_pid, signum)\n"
        f"spawn(entries.blocked_signals, ({str(tmp_path)!r},), 2, Path({str(tmp_path)!r}) / 'log')\n"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "set()", "")
    assert [path.read_text() for path in tmp_path.glob("blocked*")] == ["set()", "set()"]
