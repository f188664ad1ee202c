"""Machines that meet, agree and notice that one is gone: here two of them in threads and processes of this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mft.config.schema import Launch, LaunchMode
from mft.distributed.accelerator import free_port
from mft.errors import UserError
from mft.launch import hosts as hosts_module
from mft.launch.hosts import Hosts
from mft.launch.launch import launch
from mft.launch.meeting import meet
from mft.launch.spawn import WorkerError

LIGHT = ("mft.launch.worker", "omegaconf", "torch")
REPOSITORY = Path(__file__).parents[2]
FACTS = {"launch.nnodes": 2, "data": "a"}


def static(port: int, rank: int, **other: Any) -> Launch:
    return Launch(nnodes=2, node_rank=rank, main_address="127.0.0.1", main_port=port, join_seconds=20, **other)


def both(*calls: Callable[[], Any]) -> list[Any]:
    """Returns what each call returned or raised; they run side by side."""
    results: list[Any] = [None] * len(calls)

    def one(number: int) -> None:
        try:
            results[number] = calls[number]()
        except UserError as error:
            results[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def two(**other: Any) -> list[Hosts]:
    port = free_port()
    met = both(*(lambda rank=rank: meet(static(port, rank, **other), FACTS) for rank in (0, 1)))  # type: ignore[misc]
    assert all(isinstance(one, Hosts) for one in met), met
    return met


def test_hosts_agree_and_share_the_folder_of_host_0(tmp_path: Path) -> None:
    zero, one = two()
    told = both(lambda: zero.tell(tmp_path, zero.write(tmp_path)), one.told)
    assert told == [None, tmp_path]
    assert json.loads((tmp_path / "log" / "hosts.json").read_text())["hosts"] == one.names
    shared = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(zero.address[1])}
    assert shared.items() <= one.variables(2).items() and one.variables(2)["GLOO_SOCKET_IFNAME"] == "lo"
    both(zero.close, one.close)


def test_the_c10d_rendezvous_numbers_the_hosts_as_they_come() -> None:
    settings = Launch(nnodes=2, rdzv_endpoint=f"localhost:{free_port()}", join_seconds=20)
    met = both(*[lambda: meet(settings, FACTS)] * 2)
    assert sorted(one.rank for one in met) == [0, 1]
    both(*(one.close for one in met))


def test_hosts_that_run_different_things_are_told_apart_on_each() -> None:
    port = free_port()
    errors = both(lambda: meet(static(port, 0), FACTS), lambda: meet(static(port, 1), FACTS | {"data": "b"}))
    for error in errors:
        assert "differ in their data: b and a" in str(error)


def test_a_number_given_twice_is_refused() -> None:
    port = free_port()
    calls = [lambda: meet(static(port, 0), FACTS), *[lambda: meet(static(port, 1), FACTS)] * 2]
    assert sum("launch.node_rank=1 was given on two hosts" in str(result) for result in both(*calls)) == 1


def test_a_folder_that_only_host_0_sees_is_refused_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "VISIBLE_SECONDS", 1.0)
    zero, one = two()
    # host 1 looks for the mark of another file, as it would on a disk of its own
    told = both(lambda: zero.tell(tmp_path, zero.write(tmp_path) + "?"), one.told)
    assert all("must lie on a file system that all hosts share" in str(error) for error in told)
    both(zero.close, one.close)


def test_a_host_that_ends_or_falls_silent_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "BEAT_SECONDS", 0.1)
    zero, one = two(lost_seconds=2)
    zero.watch(tmp_path)
    one._ended.set()  # its threads stop without a word
    end = time.monotonic() + 10
    while not (tmp_path / "host0.error.json").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert zero.gone(2) == [1]
    assert "host 1 (" in json.loads((tmp_path / "host0.error.json").read_text())["message"]
    zero.close()  # without waiting for the one that is gone
    zero, one = two()

    def follow() -> None:
        try:
            one.told()
        finally:
            one.close()

    (_, error) = both(zero.close, follow)
    assert "host 0 (" in str(error) and "has ended; its terminal says why" in str(error)


@pytest.mark.parametrize(
    "settings, told",
    [
        (Launch(nnodes=2, node_rank=0, main_address="192.0.2.1"), "host 0 cannot serve there"),
        (Launch(nnodes=2, node_rank=1, main_address="nowhere.invalid"), "is no host that this machine knows"),
        (Launch(nnodes=2, node_rank=1, main_address="127.0.0.1", main_port=1, join_seconds=1), "does not answer"),
        (
            Launch(nnodes=2, node_rank=0, main_address="127.0.0.1", main_port=free_port(), join_seconds=1),
            "launch.nnodes=2, but host 1 did not come",
        ),
        (
            Launch(nnodes=2, node_rank=0, main_address="127.0.0.1", main_port=free_port(), local_addr="192.0.2.1"),
            "launch.local_addr=192.0.2.1 is no address of this machine",
        ),
    ],
)
def test_a_meeting_that_cannot_be_is_a_sentence(settings: Launch, told: str) -> None:
    settings.join_seconds = min(settings.join_seconds, 1)
    with pytest.raises(UserError, match=told):
        meet(settings, FACTS)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"nnodes": 0}, r"launch\.nnodes=0 must be at least 1"),
        ({"nnodes": 2, "node_rank": 2, "main_address": "a"}, r"launch\.node_rank=2: .* numbered 0 to 1"),
        ({"nnodes": 2, "node_rank": 1}, r"say where the machines meet"),
        ({"nnodes": 2, "main_address": "a"}, r"launch\.node_rank is missing"),
        ({"nnodes": 2, "main_address": "a", "rdzv_endpoint": "a:1"}, r"one of the two"),
        ({"nnodes": 2, "node_rank": 1, "rdzv_endpoint": "a:1"}, r"numbered as they come"),
        ({"rdzv_endpoint": "a"}, r"launch\.rdzv_endpoint=a: write host:port"),
        ({"rdzv_endpoint": "a:99999"}, r"write host:port"),
        ({"main_port": 0}, r"launch\.main_port=0 must be at least 1 and at most 65535"),
        ({"nnodes": 2, "mode": LaunchMode.inline}, r"launch=inline is one rank"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Launch(**given).check()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("entry", ["fail", "be_killed"])
def test_a_failure_on_one_host_is_told_on_each(tmp_path: Path, entry: str) -> None:
    """Rank 1, on the second host, fails or is killed; host 0 is this process."""
    (tmp_path / "config.yaml").write_text("{}")
    port = free_port()
    code = (
        "from mft.config.schema import Launch\nfrom mft.launch.meeting import meet\n"
        "from mft.launch.launch import launch\n"
        f"hosts = meet(Launch(nnodes=2, node_rank=1, main_address='127.0.0.1', main_port={port}), {FACTS!r})\n"
        f"entry, preload = 'tests.distributed.entries:{entry}', {LIGHT!r}\n"
        "try:\n    launch(hosts.told(), 1, entry=entry, preload=preload, hosts=hosts)\n"
        "finally:\n    hosts.close()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    zero = meet(static(port, 0), FACTS)
    zero.tell(tmp_path, zero.write(tmp_path))
    with pytest.raises((WorkerError, UserError)) as caught:
        launch(tmp_path, 1, entry=f"tests.distributed.entries:{entry}", preload=LIGHT, hosts=zero)
    zero.close()
    there = other.communicate(timeout=30)[1]
    for told in (str(caught.value), there):
        if entry == "fail":
            assert "rank 1 failed: ValueError: this is the cause" in told and "tests/distributed/entries.py" in told
        else:
            assert "Rank 1 was killed from outside" in told
    assert other.returncode == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
