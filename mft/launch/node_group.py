"""This machine among the machines of a run: what they agree on, the shared run folder, and heartbeats.

Every host sends a heartbeat each second, which elastic's agents do not: when the cable of one of two hosts
was pulled, under torchrun's static and its c10d rendezvous, agents and ranks of both still waited after four
minutes (torch 2.13, gloo).
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.files.json_file import read_json, write_json
from mft.launch import failures, network

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousInfo

    from mft.config.schema import Launch

BEAT_SECONDS = 1.0
"""Time between two heartbeats of a host."""

VISIBLE_SECONDS = 30.0
"""How long a file written on one host may take to appear on another: network file systems cache that a file
is absent."""

LEAVING_SECONDS = 60.0
"""How long the serving host keeps its store up for hosts that have not left yet, at most."""

FOLDER_SECONDS = 600.0
"""How long host 0 may take to choose and write the run folder."""

LEFT = "left"
"""Replaces the heartbeat of a host whose part is done."""


class NodeGroup:
    """This machine among the machines of a run."""

    def __init__(
        self, address: tuple[str, int], server: TCPStore | None, rank: int, local: str, settings: Launch
    ):
        """address: of the store; server: the store, None where another host serves it; local: this host's
        address."""
        self.address, self._server = address, server
        self.store = network.connect(address)
        """This host's connection to the store."""
        self.rank = rank
        """This host's number."""
        self.interface = network.interfaces()[local]
        """The network interface over which the ranks talk to those of other hosts."""
        self.names = [""] * settings.nnodes
        """Host name and address of every host; empty until they agree."""
        self._serving = 0  # the number of the host that serves the store
        self._own_name = f"{socket.gethostname()}, {local}"
        self._settings = settings
        self._heard = [time.monotonic()] * settings.nnodes  # when the newest heartbeat of each host came
        self._left = [False] * settings.nnodes
        self._unreachable = False
        self._closed = threading.Event()
        self.log: Path | None = None
        """Folder in which hosts that are gone are reported: the ranks of this host see it and end."""

    def require_agreement(self, facts: Mapping[str, Any]) -> None:
        """Raises UserError, on every host, unless all of them are about to run the same."""
        with self._connection():
            twice = self.store.add(f"hosts numbered {self.rank}", 1) > 1
        if twice:
            raise UserError(f"launch.node_rank={self.rank} is set on two hosts; each needs its own number.")
        own = {"name": self._own_name, "facts": dict(facts), "serves": self._server is not None}
        hosts = self.all_gather("facts", own, self._settings.join_seconds)
        self._serving = [host["serves"] for host in hosts].index(True)
        self.names = [host["name"] for host in hosts]
        for number, host in enumerate(hosts):
            for key, value in hosts[0]["facts"].items():
                if (other := host["facts"].get(key)) != value:
                    raise UserError(
                        f"host {number} ({host['name']}) and host 0 ({self.names[0]}) differ in their {key}: "
                        f"{other} and {value}. Run the same command on every host, over the same data."
                    )
        # they may have waited long for the last host, without heartbeats
        self._heard = [time.monotonic()] * self._settings.nnodes
        # two threads: `_beat` may hang in a connection whose other end has lost its power
        for work in (self._beat, self._report_gone):
            threading.Thread(target=work, daemon=True, name=f"hosts {work.__name__}").start()

    def share_folder(self, run_dir: Path | None = None) -> Path | None:
        """Returns the run folder that host 0 passes here, on every host; None: there is nothing to run.

        Raises UserError, on every host, when one of them does not see it: host 0 leaves a mark in
        log/hosts.json.
        """
        mark = uuid.uuid4().hex  # a resumed run has the file of its earlier attempt
        if run_dir is not None:
            write_json(run_dir / "log" / "hosts.json", {"mark": mark, "hosts": self.names})
        chosen, mark = self.all_gather("folder", [str(run_dir or ""), mark], FOLDER_SECONDS)[0]
        if not chosen:
            return None
        folder = Path(chosen)
        deadline, visible = time.monotonic() + VISIBLE_SECONDS, False
        while not visible and time.monotonic() < deadline:
            visible = read_json(folder / "log" / "hosts.json").get("mark") == mark
            time.sleep(0 if visible else 0.2)
        answers = self.all_gather("visible", visible, 2 * VISIBLE_SECONDS)
        if not all(answers):
            blind = ", ".join(name for name, answer in zip(self.names, answers, strict=True) if not answer)
            raise UserError(
                f"output_dir={folder} was written by host 0 ({self.names[0]}) and is not visible on {blind}: "
                "the run folder must be on a file system that all hosts share, under the same path."
            )
        return folder

    def all_gather(self, key: str, value: Any, seconds: float) -> list[Any]:
        """Returns every host's value (of JSON), by its number. All hosts call it with the same key, once.

        It polls: a wait inside torch would not react to Ctrl-C, nor notice that a host is gone.
        """
        keys = [f"{key}/{number}" for number in range(self._settings.nnodes)]
        deadline = time.monotonic() + seconds
        with self._connection():
            self.store.set(keys[self.rank], json.dumps(value))
        while True:
            with self._connection():
                joined = [bool(self.store.check([name])) for name in keys]
                if all(joined):
                    return [json.loads(self.store.get(name)) for name in keys]
            # before they agree, there are no heartbeats
            if self.names[0] and (gone := self.lost(self._settings.lost_seconds)):
                raise gone
            if self._left[0]:
                raise UserError(f"host 0 ({self.names[0]}) exited; see its terminal for the cause.")
            if time.monotonic() > deadline:
                raise too_few(sum(joined), self._settings)
            time.sleep(0.1)

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # torch has no common class for broken connections
            what = f"{endpoint(self._settings)} ({str(error).splitlines()[0]})"
            raise UserError(f"lost the connection to {what}; see the terminal of that host.") from error

    def rendezvous(self) -> RendezvousInfo:
        """Returns what elastic's agent needs to start this host's ranks of the group."""
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        bootstrap = RendezvousStoreInfo(*self.address)
        return RendezvousInfo(self.store, self.rank, self._settings.nnodes, bootstrap)

    def gone(self, seconds: float) -> list[int]:
        """Returns the hosts that were silent for so long without having left, and the one whose store is
        gone."""
        others = [n for n in range(self._settings.nnodes) if n != self.rank and not self._left[n]]
        unreachable = [self._serving] if self._unreachable else []
        return [n for n in others if n in unreachable or time.monotonic() - self._heard[n] > seconds]

    def lost(self, seconds: float) -> failures.HostGone | None:
        """Returns the error about the hosts that are `gone`, None while there are none."""
        gone = self.gone(seconds)
        if not gone:
            return None
        named = " and ".join(f"host {n} ({self.names[n]})" for n in gone)
        error = failures.HostGone(
            f"{named} {'is' if len(gone) == 1 else 'are'} gone: no heartbeat any more. What was saved is "
            "intact; run the same command on every host to resume from the newest checkpoint."
        )
        error.hosts = gone
        return error

    def close(self) -> None:
        """Announces that this host leaves. The one that serves the store waits until the others have left, or
        are gone."""
        self._left[self.rank] = True
        with suppress(Exception):  # the store is gone
            self.store.set(f"beat/{self.rank}", LEFT)
        deadline = time.monotonic() + LEAVING_SECONDS
        # all ranks are done: a host that crashes now is given 5 s at most, not lost_seconds
        while self.rank == self._serving and self.names[0] and time.monotonic() < deadline:
            gone = self.gone(min(5.0, self._settings.lost_seconds))
            if all(left or n in gone for n, left in enumerate(self._left)):
                break
            time.sleep(0.1)
        self._closed.set()

    def _beat(self) -> None:
        """Sends this host's heartbeats and notes those of the others.

        Over a separate connection: a wait on the other one, such as elastic's at the end, would delay the
        heartbeat.
        """
        number, newest = 0, [""] * self._settings.nnodes
        try:
            store = network.connect(self.address)
            while not self._closed.is_set():
                number += 1
                store.set(f"beat/{self.rank}", LEFT if self._left[self.rank] else str(number))
                for other in (n for n in range(self._settings.nnodes) if n != self.rank):
                    key = f"beat/{other}"
                    beat = store.get(key).decode() if store.check([key]) else ""
                    # by our own clock: those of two machines differ
                    if beat != newest[other]:
                        newest[other], self._heard[other] = beat, time.monotonic()
                    self._left[other] = beat == LEFT
                self._closed.wait(BEAT_SECONDS)
        except Exception:  # torch has no common class for broken connections
            self._unreachable = True

    def _report_gone(self) -> None:
        """Reports hosts that are gone; repeatedly, since a rank that is just starting ignores reports older
        than itself."""
        since = 0.0
        while not self._closed.wait(BEAT_SECONDS):
            error = self.lost(self._settings.lost_seconds)
            if error and self.log is not None:
                since = since or time.time()
                report = self.log / f"host{self.rank}.error.json"
                failures.write_report(report, error, -1, time=since, gone=error.hosts)


def too_few(joined: int, settings: Launch, reason: str = "") -> UserError:
    """Returns the error about hosts that did not come in time."""
    return UserError(
        f"only {joined} of {settings.nnodes} hosts joined at {endpoint(settings)} within "
        f"{settings.join_seconds} seconds (launch.join_seconds){reason}."
    )


def endpoint(settings: Launch) -> str:
    """Returns host:port of the store."""
    return settings.rdzv_endpoint or f"{settings.main_address}:{settings.main_port}"
