"""Several machines in one run (`launch.nnodes`): every machine runs the same command and starts its own
ranks.

One of them serves a store (torch's TCPStore) at the address that all are given: host 0 at
launch.main_address, or the one with the address of launch.rdzv_endpoint, where elastic's c10d rendezvous
numbers the hosts. There they compare what they are about to run, and host 0 publishes the run folder, which
must lie on a file system that all of them see.

From then on every host says each second that it is alive, which elastic does not: when the cable of one of
two hosts was pulled, under torchrun's static and its c10d rendezvous, agents and ranks of both still waited
after four minutes (torch 2.13, gloo). Nor do elastic's rendezvous bind their store to one address.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.files.json_file import read_json, write_json
from mft.launch.store import await_listener, connect, listening_store

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousInfo

    from mft.config.schema import Launch

BEAT_SECONDS = 1.0
"""How often a host says that it is alive."""

VISIBLE_SECONDS = 30.0
"""How long a file written on one host may take to appear on another: a network file system caches what is not
there."""

LEAVING_SECONDS = 60.0
"""How long host 0 serves its store to hosts that have not left yet, at most."""

FOLDER_SECONDS = 600.0
"""How long host 0 may take to choose and write the run folder."""

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name the network interface over which ranks talk."""

LEFT = "left"
"""What a host says instead of a heartbeat when its part is done."""


class NodeGroup:
    """This machine among the machines of a run."""

    def __init__(self, address: tuple[str, int], server: Any, rank: int, local: str, settings: Launch):
        """address: of the store; server: the store, None where another host serves it; local: this host's
        address."""
        self.address, self._server = address, server
        self.store = connect(address)
        """This host's connection to the store."""
        self.rank = rank
        """This host's number."""
        self.interface = _interfaces()[local]
        """The network interface over which the ranks talk to those of other hosts."""
        self.names = [""] * settings.nnodes
        """Host name and address of every host."""
        self._serving = 0  # the number of the host that serves the store
        self._own_name = f"{socket.gethostname()}, {local}"
        self._settings = settings
        self._heard = [time.monotonic()] * settings.nnodes
        self._left = [False] * settings.nnodes
        self._unreachable = False
        self._closed = threading.Event()
        self._log: Path | None = None

    def require_agreement(self, facts: Mapping[str, Any]) -> None:
        """Compares what the hosts are about to run; raises UserError, on each of them, unless it is the
        same."""
        with self._connection():
            twice = self.store.add(f"hosts numbered {self.rank}", 1) > 1
        if twice:
            raise UserError(
                f"launch.node_rank={self.rank} was given on two hosts; each needs its own number."
            )
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
        self._heard = [time.monotonic()] * self._settings.nnodes
        for work in (self._beat, self._report_gone):
            threading.Thread(target=work, daemon=True, name=f"hosts {work.__name__}").start()

    def share_folder(self, run_dir: Path | None = None) -> Path | None:
        """Returns the run folder that host 0 gives here, on every host; None: there is nothing to run.

        Raises UserError, on every host, when one of them does not see it: host 0 leaves a mark in
        log/hosts.json.
        """
        mark = uuid.uuid4().hex
        if run_dir is not None:
            write_json(run_dir / "log" / "hosts.json", {"mark": mark, "hosts": self.names})
        chosen = self.all_gather("folder", [str(run_dir or ""), mark], FOLDER_SECONDS)[0]
        if not chosen[0]:
            return None
        folder, mark = Path(chosen[0]), chosen[1]
        deadline, visible = time.monotonic() + VISIBLE_SECONDS, False
        while not visible and time.monotonic() < deadline:
            visible = read_json(folder / "log" / "hosts.json").get("mark") == mark
            time.sleep(0 if visible else 0.2)
        answers = self.all_gather("visible", visible, 2 * VISIBLE_SECONDS)
        if not all(answers):
            blind = ", ".join(name for name, answer in zip(self.names, answers, strict=True) if not answer)
            raise UserError(
                f"output_dir={folder} was written by host 0 ({self.names[0]}) and is not visible on "
                f"{blind}: the run "
                "folder must lie on a file system that all hosts share, under the same path."
            )
        return folder

    def all_gather(self, key: str, value: Any, seconds: float) -> list[Any]:
        """Returns every host's value (of JSON), by its number. All hosts call it with the same key, once.

        It looks again and again: a wait inside torch would not hear Ctrl-C, nor see that a host is gone.
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
            if gone := self.gone(self._settings.lost_seconds) if self.names[0] else []:
                raise UserError(self.lost(gone))
            if self._left[0]:
                raise UserError(f"host 0 ({self.names[0]}) exited; see its terminal for the cause.")
            if time.monotonic() > deadline:
                raise UserError(_too_few(sum(joined), self._settings))
            time.sleep(0.1)

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a connection can die of
            raise UserError(
                f"lost the connection to {_endpoint(self._settings)} ({str(error).splitlines()[0]}); see "
                "the terminal of the host that serves there for the cause."
            ) from error

    def rendezvous(self) -> RendezvousInfo:
        """Returns what elastic's agent needs to start this host's ranks of the group."""
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        return RendezvousInfo(
            self.store, self.rank, self._settings.nnodes, RendezvousStoreInfo(*self.address)
        )

    def watch(self, log: Path) -> None:
        """From now on reports a host that is gone in the log folder, where this host's ranks see it and
        end."""
        self._log = log

    def gone(self, seconds: float) -> list[int]:
        """Returns the hosts not heard for so long that have not left, and the one whose store is gone."""
        others = [n for n in range(self._settings.nnodes) if n != self.rank and not self._left[n]]
        silent = [n for n in others if time.monotonic() - self._heard[n] > seconds]
        lost = self._unreachable and self._serving in others and self._serving not in silent
        return [self._serving, *silent] if lost else silent

    def lost(self, gone: Sequence[int]) -> str:
        """Returns the sentence about hosts that are gone."""
        named = " and ".join(f"host {n} ({self.names[n]})" for n in gone)
        return (
            f"{named} {'is' if len(gone) == 1 else 'are'} gone: no sign of life any more. What was saved "
            "is intact; run the same command on every host to resume from the newest checkpoint."
        )

    def close(self) -> None:
        """Says that this host leaves. Who serves the store waits until the others have left, or are gone."""
        self._left[self.rank] = True
        with suppress(Exception):  # the store is gone
            self.store.set(f"beat/{self.rank}", LEFT)
        deadline = time.monotonic() + LEAVING_SECONDS
        while self.rank == self._serving and self.names[0] and time.monotonic() < deadline:
            gone = self.gone(min(5.0, self._settings.lost_seconds))
            if all(left or n in gone for n, left in enumerate(self._left)):
                break
            time.sleep(0.1)
        self._closed.set()

    def _beat(self) -> None:
        """Tells the others that this host is alive, and listens to them.

        Over a connection of its own: a wait on the other one, as elastic's at the end, would hold up the
        heartbeat.
        """
        number, last = 0, [""] * self._settings.nnodes
        try:
            store = connect(self.address)
            while not self._closed.is_set():
                number += 1
                store.set(f"beat/{self.rank}", LEFT if self._left[self.rank] else str(number))
                for other in (n for n in range(self._settings.nnodes) if n != self.rank):
                    key = f"beat/{other}"
                    beat = store.get(key).decode() if store.check([key]) else ""
                    if beat != last[other]:
                        last[other], self._heard[other] = beat, time.monotonic()
                    self._left[other] = beat == LEFT
                self._closed.wait(BEAT_SECONDS)
        except Exception:  # whatever a connection can die of
            self._unreachable = True

    def _report_gone(self) -> None:
        """Reports hosts that are gone; again and again, since a rank that is just starting takes reports by
        their age.

        A thread beside `_beat`, which may hang in a connection whose other end has lost its power.
        """
        since = 0.0
        while not self._closed.wait(BEAT_SECONDS):
            gone = self.gone(self._settings.lost_seconds)
            if gone and self._log is not None:
                since = since or time.time()
                report = {
                    "rank": -1,
                    "time": since,
                    "type": "HostGone",
                    "message": self.lost(gone),
                    "user": True,
                }
                report |= {"traceback": "", "gone": gone}
                write_json(self._log / f"host{self.rank}.error.json", report)


def join(settings: Launch, facts: Mapping[str, Any]) -> NodeGroup:
    """Returns this machine among the `launch.nnodes` of the run, once all are there and agree on `facts`.

    Raises UserError, soon after `launch.join_seconds` at the latest, when they do not come together.
    """
    static = settings.main_address is not None
    name, _, digits = _endpoint(settings).rpartition(":")
    port, key = (
        int(digits),
        f"launch.main_address={name}" if static else f"launch.rdzv_endpoint={name}:{digits}",
    )
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"{key}: this machine knows no host {name} ({error.strerror}).") from None
    interfaces = _interfaces()
    serves = settings.node_rank == 0 if static else address in interfaces
    local = settings.local_addr or (address if serves else _route(address, port))
    if serves and address not in interfaces:
        raise UserError(
            f"{key}: must be an address of host 0 (launch.node_rank=0), which has {', '.join(interfaces)}."
        )
    if local not in interfaces:
        raise UserError(
            f"launch.local_addr={local}: must be an address of this machine: {', '.join(interfaces)}."
        )
    # torch warns about every host name it cannot look up
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    server = None
    if serves:
        try:
            server = listening_store(address, port)
        except OSError as error:
            if static or error.errno != errno.EADDRINUSE:  # else another process of this machine serves there
                raise UserError(
                    f"{key}, port {port}: this host cannot serve there ({error.strerror})."
                ) from None
    if server is None and (missing := await_listener(address, port, settings.join_seconds)):
        raise UserError(_too_few(1, settings, f": {missing.strerror or missing}"))
    number = settings.node_rank if static else _number((address, port), local, settings)
    assert number is not None
    group = NodeGroup((address, port), server, number, local, settings)
    group.require_agreement(facts)
    return group


def _number(address: tuple[str, int], local: str, settings: Launch) -> int:
    """Returns this host's number by elastic's c10d rendezvous, which copes with hosts that come and go
    meanwhile."""
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # it would serve another store, on every interface
    nodes, store = settings.nnodes, connect(address)
    parameters = RendezvousParameters(
        "c10d", "", "mft", nodes, nodes, local, join_timeout=settings.join_seconds
    )
    handler = create_handler(store, C10dRendezvousBackend(store, "mft"), parameters)
    store.add("joined", 1)
    try:
        return handler.next_rendezvous().rank
    except RendezvousError as error:
        joined = min(store.add("joined", 0), nodes - 1)  # one that came, went and came again counts twice
        raise UserError(_too_few(joined, settings)) from error


def _too_few(joined: int, settings: Launch, reason: str = "") -> str:
    return (
        f"only {joined} of {settings.nnodes} hosts joined at {_endpoint(settings)} within "
        f"{settings.join_seconds} seconds (launch.join_seconds){reason}."
    )


def _endpoint(settings: Launch) -> str:
    return settings.rdzv_endpoint or f"{settings.main_address}:{settings.main_port}"


def _interfaces() -> dict[str, str]:
    """Returns the interface of every address of this machine."""
    import psutil

    return {address.address: name for name, found in psutil.net_if_addrs().items() for address in found}


def _route(address: str, port: int) -> str:
    """Returns the address of this machine from which it reaches another; sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])
