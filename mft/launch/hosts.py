"""Several machines in one run: what they agree on before a rank starts, and how they notice that one is gone.

Every machine runs the same command, and starts its own ranks. Host 0 serves a store (torch's TCPStore) that the others
and all ranks connect to; it chooses the run folder, which must lie on a file system that all of them see. How they come
together is in `mft.launch.meeting`.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.files.json_file import read_json, write_json

if TYPE_CHECKING:
    from mft.config.schema import Launch

BEAT_SECONDS = 1.0
"""How often a host says that it is alive."""

VISIBLE_SECONDS = 30.0
"""How long a file written on one host may take to appear on another: a network file system caches what is not there."""

LEAVING_SECONDS = 60.0
"""How long host 0 goes on serving its store to hosts that have not left yet, at most."""

IFNAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name the interface over which ranks talk."""

LEFT = "left"


def client(address: str, port: int) -> Any:
    """Returns a connection to host 0's store."""
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return PrefixStore("mft/hosts", store)


class Hosts:
    """This machine among the machines of a run. `rank`: its number; `names`: of all; `address`: of host 0's store."""

    def __init__(self, store: Any, rank: int, address: tuple[str, int], local: tuple[str, str], settings: Launch):
        """store: host 0's, at `address`; local: this machine's address and the interface that has it."""
        self.rank, self.address, self.local, self.settings = rank, address, local, settings
        self.names: list[str] = []
        self._store = store
        self._heard = [time.monotonic()] * settings.nnodes
        self._left = [False] * settings.nnodes
        self._unreachable = False
        self._ended = threading.Event()
        self._log: Path | None = None

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Waits for all hosts; raises UserError, on each of them, unless all facts are the same everywhere."""
        own = {"name": f"{socket.gethostname()}, {self.local[0]}", "token": uuid.uuid4().hex, "facts": dict(facts)}
        self._set(f"host/{self.rank}", own)
        if self.rank == 0:
            end = time.monotonic() + self.settings.join_seconds
            roster = [self._wait(f"host/{n}", end, f"host {n} did not come") for n in range(self.settings.nnodes)]
            self._set("roster", roster)
        else:
            roster = self._wait("roster", time.monotonic() + self.settings.join_seconds, "not all hosts came")
        if roster[self.rank]["token"] != own["token"]:
            raise UserError(f"launch.node_rank={self.rank} was given on two hosts; each needs a number of its own.")
        self.names = [host["name"] for host in roster]
        for number, host in enumerate(roster):
            for key, value in roster[0]["facts"].items():
                if host["facts"].get(key) != value:
                    raise UserError(
                        f"host {number} ({host['name']}) and host 0 ({self.names[0]}) differ in their {key}: "
                        f"{host['facts'].get(key)} and {value}. Run the same command on every host, over the same data."
                    )
        self._heard = [time.monotonic()] * self.settings.nnodes
        for work in (self._beat, self._look):
            threading.Thread(target=work, daemon=True, name=f"hosts {work.__name__}").start()

    def write(self, run_dir: Path) -> str:
        """Leaves the hosts in log/hosts.json; returns the mark in it by which another host knows this very file."""
        mark = uuid.uuid4().hex
        write_json(run_dir / "log" / "hosts.json", {"mark": mark, "hosts": self.names})
        return mark

    def tell(self, run_dir: Path | None, mark: str = "") -> None:
        """Host 0 names the run folder to the others (None: there is nothing to run), and waits until they see it."""
        self._set("folder", {"path": str(run_dir) if run_dir else None, "mark": mark})
        if run_dir:
            self._require_visible(run_dir, mark)

    def told(self) -> Path | None:
        """Returns the run folder that host 0 chose; raises UserError when not every host sees it."""
        found = self._wait("folder", time.monotonic() + 10 * self.settings.join_seconds, "host 0 named no run folder")
        if found["path"] is None:
            return None
        self._require_visible(Path(found["path"]), found["mark"])
        return Path(found["path"])

    def _require_visible(self, run_dir: Path, mark: str) -> None:
        end = time.monotonic() + VISIBLE_SECONDS
        while not (seen := read_json(run_dir / "log" / "hosts.json").get("mark") == mark):
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        self._set(f"sees/{self.rank}", seen)
        wait = time.monotonic() + 2 * VISIBLE_SECONDS
        sees = [self._wait(f"sees/{n}", wait, f"host {n} does not answer") for n in range(self.settings.nnodes)]
        if not all(sees):
            blind = ", ".join(name for name, answer in zip(self.names, sees, strict=True) if not answer)
            raise UserError(
                f"output_dir={run_dir} was written by host 0 ({self.names[0]}) and is not seen by {blind}: the run "
                "folder must lie on a file system that all hosts share, under the same path."
            )

    def variables(self, nproc: int) -> dict[str, str]:
        """Returns the environment that makes `nproc` ranks of each host one group."""
        found = {"WORLD_SIZE": nproc * self.settings.nnodes, "MASTER_ADDR": self.address[0]}
        found |= {"MASTER_PORT": self.address[1]}
        found |= dict.fromkeys(IFNAMES, self.local[1])
        return {name: str(value) for name, value in found.items()}

    def watch(self, log: Path) -> None:
        """From now on a host that is gone is reported in the log folder, where this host's ranks see it and end."""
        self._log = log

    def gone(self, seconds: float) -> list[int]:
        """Returns the hosts that were not heard for so long and have not left; host 0 too when its store is gone."""
        now, others = time.monotonic(), [n for n in range(self.settings.nnodes) if n != self.rank and not self._left[n]]
        silent = [n for n in others if now - self._heard[n] > seconds]
        return [0, *silent] if self._unreachable and 0 not in silent and 0 in others else silent

    def sentence(self, gone: Sequence[int]) -> str:
        """Returns what to tell about hosts that are gone."""
        named = " and ".join(f"host {n} ({self.names[n]})" for n in gone)
        return (
            f"{named} {'is' if len(gone) == 1 else 'are'} gone: no sign of life any more. What was saved is intact; "
            "the same command on every host goes on from the newest checkpoint."
        )

    def close(self) -> None:
        """Says that this host leaves. Host 0 waits until the others have left, or are gone: they need its store."""
        self._left[self.rank] = True
        with suppress(Exception):  # host 0 was faster, or is gone
            self._store.set(f"beat/{self.rank}", LEFT)
        end = time.monotonic() + LEAVING_SECONDS
        while self.rank == 0 and self.names and time.monotonic() < end:
            gone = self.gone(min(5.0, self.settings.lost_seconds))
            if all(self._left[n] or n in gone for n in range(1, self.settings.nnodes)):
                break
            time.sleep(0.1)
        self._ended.set()

    def _beat(self) -> None:
        """Tells the others that this host is alive, and listens to them; over a connection of its own."""
        number, last = 0, [""] * self.settings.nnodes
        try:
            store = client(*self.address)
            while not self._ended.is_set():
                number += 1
                store.set(f"beat/{self.rank}", LEFT if self._left[self.rank] else str(number))
                for other in (n for n in range(self.settings.nnodes) if n != self.rank):
                    said = store.get(f"beat/{other}").decode() if store.check([f"beat/{other}"]) else ""
                    if said != last[other]:
                        last[other], self._heard[other] = said, time.monotonic()
                    self._left[other] = said == LEFT
                self._ended.wait(BEAT_SECONDS)
        except Exception:  # whatever a connection can die of
            self._unreachable = True

    def _look(self) -> None:
        """Reports hosts that are gone; again and again, since a rank that is just starting takes reports by their age.

        A thread beside `_beat`, which may hang in a connection whose other end has lost its power.
        """
        since = 0.0
        while not self._ended.wait(BEAT_SECONDS):
            gone = self.gone(self.settings.lost_seconds)
            if gone and self._log is not None:
                since = since or time.time()
                message = self.sentence(gone)
                report = {"rank": -1, "time": since, "type": "HostGone", "message": message, "user": True}
                report |= {"traceback": "", "gone": gone}
                write_json(self._log / f"host{self.rank}.error.json", report)

    def _set(self, key: str, value: Any) -> None:
        self._guarded(lambda: self._store.set(key, json.dumps(value)))

    def _wait(self, key: str, end: float, otherwise: str) -> Any:
        """Returns what was set under a key, looking again and again: a wait inside torch would not hear Ctrl-C."""
        while not self._guarded(lambda: self._store.check([key])):
            gone = self.gone(self.settings.lost_seconds) if self.names else []
            if gone:
                raise UserError(self.sentence(gone))
            if self.names and self.rank and self._left[0]:
                raise UserError(f"host 0 ({self.names[0]}) has ended; its terminal says why.")
            if time.monotonic() > end:
                where = f"{self.address[0]}:{self.address[1]}"
                raise UserError(f"launch.nnodes={self.settings.nnodes}, but {otherwise} (meeting at {where}).")
            time.sleep(0.1)
        return json.loads(self._guarded(lambda: self._store.get(key)))

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            host = f"{self.address[0]}:{self.address[1]}"
            raise UserError(f"the connection to host 0 ({host}) broke: {str(error).splitlines()[0]}") from error
