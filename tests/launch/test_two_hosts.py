"""Two hosts made of network namespaces: a run on both equals the run of two processes on one, and survives a
host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mft.training.checkpoint import complete_steps
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import LAYOUTS, SETTINGS, frozen, logged, play, write_tasks

REPOSITORY = Path(__file__).parents[2]
ADDRESSES = ("10.83.0.1", "10.83.0.2")
RUN = (
    *SETTINGS,
    *LAYOUTS["pad"],
    "train.resume=auto",
    "train.eval_every=null",
    "train.eval_at_start=false",
    "train.epochs=1000",
    "train.save_every=4",
    "scheduler=constant",  # so that a longer run begins with the steps of a shorter one
    "dist=ddp",
    "peft=lora",
    "launch.lost_seconds=10",
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces that see each other through a pair of virtual cables, and nothing
    else."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 (the command ip)")
    names = [f"mft{os.getpid()}{end}" for end in "ab"]
    cables = [f"m{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            cables[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            cables[1],
            "netns",
            names[1],
        )
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            for device in (cable, "lo"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=300)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield names
    for name in names:
        assert wait_until_empty(name) == "", "processes were left behind"
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=300)


def wait_until_empty(host: str) -> str:
    """Returns the pids that are left on a host after some seconds."""
    for _ in range(100):
        left = subprocess.run(
            ["ip", "netns", "pids", host], capture_output=True, text=True, timeout=300
        ).stdout.strip()
        if not left:
            return ""
        time.sleep(0.1)
    return left


def start(host: str, overrides: list[str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_IFNAME")}
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "mft.cli", "train", *RUN, *overrides],
        cwd=REPOSITORY,
        env=environment | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results(processes: list[subprocess.Popen[str]], timeout: float = 400) -> list[str]:
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.long
def test_two_hosts_train_like_one_and_survive_the_loss_of_one(hosts: list[str], tmp_path: Path) -> None:
    tasks = f"data.paths=[{','.join(map(str, write_tasks(tmp_path / 'tasks')))}]"
    common = [tasks, f"cache_dir={tmp_path / 'cache'}", "launch.nproc=1", "launch.nnodes=2"]

    # through c10d, one command for both; then the cable is cut, which no connection is told of
    c10d = [*common, f"launch.rdzv_endpoint={ADDRESSES[1]}:29400", f"output_dir={tmp_path / 'run'}"]
    processes = [start(host, [*c10d, "train.max_steps=100000"]) for host in hosts]
    begin = time.monotonic()
    while not complete_steps(tmp_path / "run" / "checkpoints"):
        assert all(process.poll() is None for process in processes), results(processes)
        assert time.monotonic() - begin < 400
        time.sleep(0.1)
    ip("-n", hosts[0], "link", "set", f"m{os.getpid()}a", "down")
    # 10 s until a host counts as gone, 5 until a rank in a collective is ended, and what a busy machine adds;
    # gloo by itself would wait for half an hour
    said = results(processes, timeout=300)
    assert [process.returncode for process in processes] == [1, 1]
    names = json.loads((tmp_path / "run" / "log" / "hosts.json").read_text())["hosts"]
    ours = [next(n for n, name in enumerate(names) if name.endswith(address)) for address in ADDRESSES]
    for text, other in zip(said, reversed(ours), strict=True):
        assert f"host {other} ({names[other]}) is gone" in text and "What was saved is intact" in text
    assert all(wait_until_empty(host) == "" for host in hosts)
    ip("-n", hosts[0], "link", "set", f"m{os.getpid()}a", "up")

    # both go on from the newest checkpoint, now at an address
    newest = complete_steps(tmp_path / "run" / "checkpoints")[-1]
    steps = newest + 4
    static = [
        *common,
        f"launch.main_address={ADDRESSES[0]}",
        f"output_dir={tmp_path / 'run'}",
        f"train.max_steps={steps}",
    ]
    again = [start(host, [*static, f"launch.node_rank={rank}"]) for rank, host in enumerate(hosts)]
    said = results(again)
    assert [process.returncode for process in again] == [0, 0], said
    assert f"resuming from step-{newest}" in said[0] and "step-" not in said[1]

    one = frozen(
        tmp_path / "one",
        [*RUN, tasks, f"cache_dir={tmp_path / 'cache'}", "launch.nproc=2", f"train.max_steps={steps}"],
    )
    run_ranks(2, play, [one])
    assert len(logged(one, "train/loss")) == steps
    assert logged(tmp_path / "run", "train/loss") == logged(one, "train/loss")
    assert logged(tmp_path / "run", "grad_norm") == logged(one, "grad_norm")
