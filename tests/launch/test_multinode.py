"""Machines that meet, agree and notice that one is gone: here two of them in threads and processes of this
machine."""

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
from mft.launch import node_group
from mft.launch.failures import WorkerError
from mft.launch.multinode import join
from mft.launch.node_group import NodeGroup
from mft.launch.spawn import spawn
from tests.launch import entries

REPOSITORY = Path(__file__).parents[2]
FACTS = {"launch.nnodes": 2, "data": "a"}


def static(port: int, rank: int, **other: Any) -> Launch:
    return Launch(
        nnodes=2, node_rank=rank, main_address="127.0.0.1", main_port=port, join_seconds=60, **other
    )


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


def two(**other: Any) -> list[NodeGroup]:
    port = free_port()
    groups = both(*(lambda rank=rank: join(static(port, rank, **other), FACTS) for rank in (0, 1)))  # type: ignore[misc]
    assert all(isinstance(one, NodeGroup) for one in groups), groups
    return groups


def test_hosts_agree_and_share_the_folder_of_host_0(tmp_path: Path) -> None:
    zero, one = two()
    assert both(lambda: zero.share_folder(tmp_path), one.share_folder) == [tmp_path, tmp_path]
    assert json.loads((tmp_path / "log" / "hosts.json").read_text())["hosts"] == one.names
    assert one.address == zero.address == ("127.0.0.1", zero.address[1]) and one.interface == "lo"
    both(zero.close, one.close)
    zero, one = two()
    assert both(lambda: zero.share_folder(None), one.share_folder) == [None, None]  # there is nothing to run
    both(zero.close, one.close)


def test_the_c10d_rendezvous_numbers_the_hosts_as_they_come() -> None:
    settings = Launch(nnodes=2, rdzv_endpoint=f"localhost:{free_port()}", join_seconds=20)
    groups = both(*[lambda: join(settings, FACTS)] * 2)
    assert sorted(one.rank for one in groups) == [0, 1]
    both(*(one.close for one in groups))


def test_hosts_that_run_different_things_are_refused_on_each() -> None:
    port = free_port()
    errors = both(lambda: join(static(port, 0), FACTS), lambda: join(static(port, 1), FACTS | {"data": "b"}))
    for error in errors:
        assert "differ in their data: b and a" in str(error)


def test_a_number_given_twice_is_refused() -> None:
    port = free_port()
    calls = [lambda: join(static(port, 0), FACTS), *[lambda: join(static(port, 1), FACTS)] * 2]
    assert sum("launch.node_rank=1 is set on two hosts" in str(result) for result in both(*calls)) == 1


def test_a_folder_that_only_host_0_sees_is_refused_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_group, "VISIBLE_SECONDS", 1.0)
    zero, one = two()
    there, here = tmp_path / "there", tmp_path / "here"
    here.mkdir()

    def share() -> Path | None:
        with monkeypatch.context() as patch:  # host 1 has a disk of its own
            patch.setattr(one, "all_gather", lambda key, value, seconds: elsewhere(key, value, seconds))
            return one.share_folder()

    def elsewhere(key: str, value: Any, seconds: float) -> list[Any]:
        values = NodeGroup.all_gather(one, key, value, seconds)
        return [[str(here), values[0][1]], values[1]] if key == "folder" else values

    errors = both(lambda: zero.share_folder(there), share)
    assert all("must be on a file system that all hosts share" in str(error) for error in errors)
    both(zero.close, one.close)


def test_a_host_that_ends_or_falls_silent_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_group, "BEAT_SECONDS", 0.1)
    zero, one = two(lost_seconds=2)
    zero.log = tmp_path
    one._closed.set()  # its threads stop without a word
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
            one.share_folder()
        finally:
            one.close()

    (_, error) = both(zero.close, follow)
    assert "host 0 (" in str(error) and "exited; see its terminal for the cause" in str(error)


@pytest.mark.parametrize(
    "settings, message",
    [
        (Launch(nnodes=2, node_rank=0, main_address="192.0.2.1"), "must be an address of host 0"),
        (
            Launch(nnodes=2, node_rank=1, main_address="nowhere.invalid"),
            "unknown host nowhere.invalid",
        ),
        (
            Launch(nnodes=2, node_rank=1, main_address="127.0.0.1", main_port=1),
            r"only 1 of 2 hosts joined at 127\.0\.0\.1:1 within 1 seconds \(launch\.join_seconds\): "
            r"Connection refused",
        ),
        (
            Launch(nnodes=2, node_rank=0, main_address="127.0.0.1", main_port=free_port(), join_seconds=1),
            r"only 1 of 2 hosts joined at 127\.0\.0\.1:\d+ within 1 seconds \(launch\.join_seconds\)\.",
        ),
        (
            Launch(nnodes=2, rdzv_endpoint=f"127.0.0.1:{free_port()}"),
            r"only 1 of 2 hosts joined at 127\.0\.0\.1:",
        ),
        (
            Launch(nnodes=2, rdzv_endpoint="192.0.2.1:29400"),
            r"only 1 of 2 hosts joined at 192\.0\.2\.1:29400",
        ),
        (
            Launch(
                nnodes=2, node_rank=0, main_address="127.0.0.1", main_port=free_port(), local_addr="192.0.2.1"
            ),
            "launch.local_addr=192.0.2.1 must be an address of this machine",
        ),
    ],
)
def test_hosts_that_do_not_come_together_are_a_sentence_in_bounded_time(
    settings: Launch, message: str
) -> None:
    settings.join_seconds = min(settings.join_seconds, 1)
    with pytest.raises(UserError, match=message):
        join(settings, FACTS)


@pytest.mark.parametrize(
    "given, message",
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
def test_wrong_settings_are_refused_before_anything_starts(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Launch(**given).check()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("entry", ["fail", "be_killed"])
def test_a_failure_on_one_host_is_reported_on_each(tmp_path: Path, entry: str) -> None:
    """Rank 1, on the second host, fails or is killed; host 0 is this process."""
    port, before = free_port(), signal.getsignal(signal.SIGINT)
    code = (
        "from mft.config.schema import Launch\nfrom mft.launch.multinode import join\n"
        "from mft.launch.spawn import spawn, start_fork_server\nfrom tests.launch import entries\n"
        "start_fork_server(('mft.launch.worker', 'torch'))\n"
        f"nodes = join(Launch(nnodes=2, node_rank=1, main_address='127.0.0.1', main_port={port}), "
        f"{FACTS!r})\n"
        "folder = nodes.share_folder()\n"
        f"try:\n    spawn(entries.{entry}, (str(folder),), 1, folder / 'log', nodes=nodes)\n"
        "finally:\n    nodes.close()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    zero = join(static(port, 0, lost_seconds=30), FACTS)
    zero.share_folder(tmp_path)
    with pytest.raises((WorkerError, UserError)) as caught:
        spawn(getattr(entries, entry), (str(tmp_path),), 1, tmp_path / "log", nodes=zero)
    zero.close()
    there = other.communicate(timeout=30)[1]
    for text in (str(caught.value), there):
        if entry == "fail":
            assert (
                "rank 1 failed: ValueError: this is the cause" in text and "tests/launch/entries.py" in text
            )
        else:
            assert "Rank 1 was killed from outside" in text
    assert other.returncode == 1 and signal.getsignal(signal.SIGINT) is before
