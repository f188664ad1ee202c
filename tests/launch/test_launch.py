"""Launching, through the real fork server and real signals; workers run stand-ins of tests/distributed/entries.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mft.errors import UserError
from mft.launch.launch import Place, Stopped, WorkerError, launch, place, ranks
from mft.launch.spawn import loopback
from mft.launch.worker import Stop, exit_code

LIGHT = ("mft.launch.worker", "omegaconf", "torch")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = {
        "name": "tiny",
        "train": {"per_device_batch_size": 8},
        "data": {"seq_length": 4096},
        "model": {"gradient_checkpointing": "auto"},
        "peft": {"_target_": "mft.model.peft.lora.Lora"},
        "dist": {"_target_": "mft.distributed.ddp.Ddp"},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(autouse=True)
def placed_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK"))]:
        monkeypatch.delenv(name)


def go(run_dir: Path, entry: str, nproc: int = 2, **options: object) -> None:
    launch(run_dir, nproc, entry=f"tests.distributed.entries:{entry}", preload=LIGHT, **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.dist
def test_every_rank_runs_and_the_next_job_starts_at_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(run_dir, "tell")
    monkeypatch.setenv("MFT_TEST", "set after the fork server came up")
    begin = time.monotonic()
    go(run_dir, "tell")
    assert time.monotonic() - begin < 3.0
    first, second = (json.loads((run_dir / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"]) == ("0", "1", "2")
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MFT_TEST"] == "set after the fork server came up"
    assert first["name"] == "tiny"
    assert "told by rank 1" in (run_dir / "log" / "rank1.log").read_text()
    assert (run_dir / "log" / "rank0.log").read_text().count("told by rank 0") == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.dist
def test_the_rank_that_failed_first_is_heard(run_dir: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        go(run_dir, "fail")
    assert time.monotonic() - begin < 15.0
    assert caught.value.sentence == "rank 1 failed: ValueError: this is the cause"
    assert "tests/distributed/entries.py" in caught.value.traceback and "_together" in caught.value.traceback
    assert json.loads((run_dir / "log" / "rank1.error.json").read_text())["type"] == "ValueError"
    go(run_dir, "tell")
    assert not list((run_dir / "log").glob("*.error.json"))


@pytest.mark.slow
@pytest.mark.dist
def test_a_mistake_found_in_a_worker_is_one_sentence(run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.paths: /nowhere does not exist$"):
        go(run_dir, "refuse")


@pytest.mark.slow
@pytest.mark.dist
def test_memory_that_runs_out_names_what_to_lower(run_dir: Path) -> None:
    with pytest.raises(UserError) as caught:
        go(run_dir, "exhaust")
    for part in ("train.per_device_batch_size (now 8)", "data.seq_length (now 4096)", "peft=qlora (now lora)"):
        assert part in str(caught.value)
    assert "model.gradient_checkpointing=true (now auto)" in str(caught.value)
    assert "dist=zero3 (now ddp)" in str(caught.value)


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_rank_is_told_from_the_ranks_that_lost_it(run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"Rank 1 was killed from outside, probably because .* memory ran out"):
        go(run_dir, "be_killed")


def in_a_process(run_dir: Path, entry: str, nproc: int = 2, options: str = "") -> subprocess.Popen[str]:
    """Starts a launching process of its own and waits until its ranks are at work."""
    code = (
        "import sys\nfrom mft.launch.launch import Stopped, launch\n"
        f"entry, preload = 'tests.distributed.entries:{entry}', {LIGHT!r}\n"
        f"try:\n    launch({str(run_dir)!r}, {nproc}, entry=entry, preload=preload{options})\n"
        "except Stopped as stopped:\n    sys.exit(stopped.code)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 60
    while sum(1 for _ in run_dir.glob("ready*")) < nproc:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)
    return process


def workers(run_dir: Path) -> list[psutil.Process]:
    return [psutil.Process(int(path.read_text())) for path in sorted(run_dir.glob("ready*"))]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("entry", "signum", "code"),
    [
        ("until_stopped", signal.SIGTERM, 75),
        ("until_stopped", signal.SIGINT, 130),
        ("uneven", signal.SIGTERM, 143),
    ],
)
def test_a_signal_lets_workers_save_and_says_so_in_the_exit_code(
    run_dir: Path, entry: str, signum: int, code: int
) -> None:
    process = in_a_process(run_dir, entry)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    assert output == ""
    assert ("stopped" in (run_dir / "summary.json").read_text()) if code != 143 else True
    assert not any(map(alive, pids(run_dir)))


@pytest.mark.slow
@pytest.mark.dist
def test_workers_that_do_not_listen_are_ended_after_shutdown_seconds(run_dir: Path) -> None:
    process = in_a_process(run_dir, "deaf", options=", shutdown_seconds=1")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert not any(map(alive, pids(run_dir)))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("how", ["kill -9", "second Ctrl-C"])
def test_no_worker_outlives_the_process_that_launched_it(run_dir: Path, how: str) -> None:
    process = in_a_process(run_dir, "deaf")
    server = workers(run_dir)[0].parent()
    if how == "kill -9":
        process.kill()
    else:
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + 5  # before anybody reaps the process: as a zombie it still has its pid
    while any(map(alive, pids(run_dir))):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.1)
    process.communicate(timeout=5)
    assert process.returncode == (-signal.SIGKILL if how == "kill -9" else 130)
    assert server is not None and not psutil.wait_procs([server], timeout=5)[1]


def pids(run_dir: Path) -> list[int]:
    return [int(path.read_text()) for path in run_dir.glob("ready*")]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_inline_runs_in_this_process(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch(run_dir, "auto", "inline", entry="tests.distributed.entries:tell")
    assert "told by rank 0" in capfd.readouterr().out
    assert json.loads((run_dir / "rank0.json").read_text())["RANK"] is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(UserError, match=r"launch\.nproc=2"):
        launch(run_dir, 2, "inline", entry="tests.distributed.entries:tell")


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_replays_a_run_and_its_ranks_share_what_rank_0_decides(run_dir: Path) -> None:
    code = (
        "import os\nfrom mft import worker\nfrom mft.distributed.ddp import Ddp\nfrom mft.launch.launch import share\n"
        "for time in range(2):\n    assert share([time, os.environ['RANK']]) == [time, '0']\n"
        "Ddp().start('fp32', cpu=True).close()\n"
        f"worker.worker.__defaults__ = ('tests.distributed.entries:tell',)\nworker.main([{str(run_dir)!r}])\n"
    )
    (run_dir / "replay.py").write_text(code)
    done = subprocess.run(
        [
            sys.executable,
            *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            str(run_dir / "replay.py"),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "rank1.json").read_text())["WORLD_SIZE"] == "2"
    assert "told by rank 0" in done.stdout and "told by rank 1" not in done.stdout


def test_a_process_knows_where_it_was_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place() is None and ranks("auto") >= 1
    before = dict(os.environ)
    slurm = {"PROCID": "5", "LOCALID": "1", "STEP_NUM_TASKS": "8", "STEP_NODELIST": "gpu[03-04]", "JOB_ID": "12345"}
    for name, value in (slurm | {"STEP_TASKS_PER_NODE": "4(x2)"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    try:
        assert place() == Place(5, 1, 8) and ranks(3) == 8
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03", "22345")
        assert os.environ["LOCAL_WORLD_SIZE"] == "4"
    finally:
        for name in set(os.environ) - set(before) - {f"SLURM_{key}" for key in (*slurm, "STEP_TASKS_PER_NODE")}:
            del os.environ[name]


def test_a_slurm_step_of_one_task_launches_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a batch script outside srun
    assert place() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert place() is None


@pytest.mark.parametrize("nproc", [0, -1, "two", 1.5])
def test_a_wrong_number_of_ranks_is_refused(nproc: object) -> None:
    with pytest.raises(UserError, match=r"launch\.nproc="):
        ranks(nproc)  # type: ignore[arg-type]


def test_exit_codes(tmp_path: Path) -> None:
    assert exit_code(tmp_path, signal.SIGTERM) == 143
    (tmp_path / "summary.json").write_text('{"status": "stopped"}')
    assert exit_code(tmp_path, signal.SIGTERM) == 75
    assert exit_code(tmp_path, signal.SIGINT) == 130
    assert isinstance(Stopped(signal.SIGINT, 130), KeyboardInterrupt)


def test_later_signals_change_nothing() -> None:
    stop = Stop()
    assert not stop()
    stop.request(signal.SIGTERM)
    stop.request(signal.SIGINT)
    assert stop() and stop.signal == signal.SIGTERM


def test_launching_is_importable_without_torch() -> None:
    code = (
        "import sys, mft.launch.launch, mft.launch.worker\n"
        "sys.exit('torch' in sys.modules or 'omegaconf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_the_store_of_the_ranks_is_reached_over_loopback_alone() -> None:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    handler = loopback(RendezvousParameters("loopback", "", "test", 1, 1))
    port = handler.next_rendezvous().bootstrap_store_info.master_port
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]
