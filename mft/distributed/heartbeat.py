"""Waiting for other ranks outside of collectives, and the signs of life that tell slow ranks from frozen.

A collective ends in an error after `dist.timeout_minutes`, whether the rank that it waits for is gone or only
writes to a slow disk. So ranks wait for the lone work of one of them in `wait_for_all`: over the store by
which the process group meets, without a collective. Meanwhile, and as long as the ranks are up, a thread of
each sends heartbeats over that store. A rank without any for `dist.timeout_minutes` has stalled, and each
other one knows it, whatever its main thread waits for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from mft.distributed import torch_private
from mft.distributed.stalled import TIMED_OUT, Stalled

if TYPE_CHECKING:
    from torch.distributed import Store

LONGEST_HOURS = 24.0
"""How long ranks wait for one that is alive but does not come: the largest models take hours to write to the
slowest disks, and no run should wait forever for a deadlock that happens outside of a step."""

STARTING_SECONDS = 600.0
"""How long a rank may take until its first heartbeat, at least: its imports may come from a slow disk."""

LEAVING_SECONDS = 10.0
"""How long rank 0 keeps the store up for ranks that have not left yet, at most."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.002, 0.25
"""Seconds between two looks at the store while a rank waits; doubled from one to the other."""

LEFT = "left"
"""Replaces the heartbeat of a rank whose part is done."""


class Heartbeat:
    """This rank among the ranks of the run."""

    def __init__(self, store: Store, rank: int, world: int, minutes: float):
        """store: a connection of its own, since another thread's wait would delay a heartbeat."""
        self.rank, self.world = rank, world
        self.minutes = minutes
        """`dist.timeout_minutes`."""
        self._store = store
        self._others = [other for other in range(world) if other != rank]
        self._newest = dict.fromkeys(self._others, "")
        # as if heard later: the others may still be starting
        self._heard = dict.fromkeys(self._others, time.monotonic() + max(0.0, STARTING_SECONDS - self.limit))
        self._asked: float | None = None  # since when the store has not answered this rank
        self._beaten = time.monotonic()  # when this rank last sent a heartbeat
        self._beats = self._round = 0
        self._arrived: threading.Event | None = None  # of the round for which the main thread waits
        self._lost: Exception | None = None
        self._leaving = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    @property
    def limit(self) -> float:
        """`dist.timeout_minutes` in seconds."""
        return self.minutes * 60

    def wait_for_all(self) -> None:
        """Waits until every rank has called this as often. Raises Stalled, or what broke the connection."""
        began = time.monotonic()
        self._round += 1
        self._arrived = arrived = threading.Event()
        self._wake.set()
        while not arrived.wait(LONGEST_PAUSE):  # in Python, so that signals are handled
            if self._lost is not None:
                raise self._lost
            if stalled := self.stalled():
                raise stalled
            if (waited := time.monotonic() - began) > LONGEST_HOURS * 3600:
                late = [
                    r for r, beat in self._newest.items() if int(beat.partition(" ")[2] or 0) < self._round
                ]
                raise self._stalled(late, waited, silent=False, limit=f"{LONGEST_HOURS:g} hours")

    def stalled(self, seconds: float | None = None) -> Stalled | None:
        """Returns the error about ranks without a sign of life for so long, by default for `limit`."""
        now, seconds = time.monotonic(), self.limit if seconds is None else seconds
        asked = self._asked
        if asked is not None and now - asked > seconds:
            # who serves the store does not answer: rank 0, or the process that started the ranks
            serving = [] if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else [0]
            return self._stalled(serving, now - asked, silent=True)
        silence = {r: now - heard for r, heard in self._heard.items() if self._newest[r] != LEFT}
        silent = [r for r, duration in silence.items() if duration > seconds]
        return self._stalled(silent, max(silence.values()), silent=True) if silent else None

    def timed_out(self) -> Stalled:
        """Returns the error of a collective that timed out here, with the ranks that are silent, if any."""
        return self.stalled(self.limit / 2) or self._stalled([], self.limit, silent=False)

    def _stalled(self, ranks: Sequence[int], seconds: float, silent: bool, limit: str = "") -> Stalled:
        limit = limit or f"dist.timeout_minutes={self.minutes:g}"
        return Stalled(ranks, time.time() - seconds, limit, silent, self.world)

    def leave(self) -> None:
        """Ends the heartbeats; that they end is no stall. Rank 0 waits a little for the others, since it may
        serve the store."""
        self._leaving = True
        self._wake.set()
        self._thread.join(LEAVING_SECONDS)

    def _run(self) -> None:
        posted, pause = 0, SHORTEST_PAUSE
        try:
            while not self._leaving:
                interval = min(15.0, max(0.1, self.limit / 20))
                self._asked = time.monotonic()
                if self._beats == 0 or self._asked - self._beaten >= interval:
                    self._beat()
                if self._arrived is None:
                    self._asked = None
                    self._wake.wait(interval)
                    self._wake.clear()
                    continue
                if posted < self._round:
                    posted, pause = self._round, SHORTEST_PAUSE
                    if self._store.add(f"arrived/{posted}", 1) == self.world:
                        self._store.set(f"all/{posted}", "")
                        # all have left the round before: a long run must not fill the store
                        self._store.delete_key(f"arrived/{posted}")
                        self._store.delete_key(f"all/{posted - 1}")
                if self._store.check([f"all/{posted}"]):
                    arrived, self._arrived = self._arrived, None
                    arrived.set()
                else:
                    self._asked = None
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
            self._say_goodbye()
        except Exception as error:  # torch has no common class for broken connections
            self._lost = error

    def _beat(self) -> None:
        """Sends a heartbeat and notes those of the others, by this rank's own clock."""
        now = time.monotonic()
        if now - self._beaten > self.limit / 2:  # this rank itself was stopped, and has heard nobody since
            self._heard = {r: max(heard, now) for r, heard in self._heard.items()}
        self._beaten = now
        self._beats += 1
        self._store.set(f"beat/{self.rank}", f"{self._beats} {self._round}")
        self._listen()

    def _listen(self) -> None:
        # a get would wait for a rank that has not begun
        begun = [r for r in self._others if self._newest[r] or self._store.check([f"beat/{r}"])]
        beats = self._store.multi_get([f"beat/{r}" for r in begun]) if begun else []
        for r, beat in zip(begun, map(bytes.decode, beats), strict=True):
            if beat != self._newest[r]:
                self._newest[r], self._heard[r] = beat, time.monotonic()

    def _say_goodbye(self) -> None:
        self._store.set(f"beat/{self.rank}", LEFT)
        deadline = time.monotonic() + LEAVING_SECONDS
        while self.rank == 0 and time.monotonic() < deadline and set(self._newest.values()) != {LEFT}:
            time.sleep(LONGEST_PAUSE / 5)
            self._listen()


_current: Heartbeat | None = None
_begun = 0


def start(minutes: float) -> None:
    """Starts the heartbeats of this rank, which is read from the environment; all ranks call it.

    minutes: `dist.timeout_minutes`. A run of one rank has nobody to wait for.
    """
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    global _current, _begun
    if _current is not None:
        _current.minutes = minutes
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _begun += 1
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=STARTING_SECONDS)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"mft/heartbeat/{attempt}/{_begun}"
        _current = Heartbeat(PrefixStore(prefix, store), rank, world, minutes)


def stop() -> None:
    """Ends the heartbeats of this rank."""
    global _current
    if _current is not None:
        _current.leave()
    _current = None


def wait_for_all() -> None:
    """Waits until every rank is here, however long one of them works alone.

    Raises Stalled when a rank gives no sign of life for `dist.timeout_minutes`, or does not come within 24
    hours.
    """
    if _current is not None:
        _current.wait_for_all()


_patience = 0
"""How many blocks of `patient` this process is in."""


@contextmanager
def patient() -> Iterator[None]:
    """Context in which ranks may work at very different paces: collectives wait for the slow ones, too.

    All ranks enter it; at its end they wait for each other. Raises as `wait_for_all`.
    """
    global _patience
    if _current is None:
        yield
        return
    limit = timedelta(seconds=_current.limit)
    _patience += 1
    torch_private.set_timeout(max(limit, timedelta(hours=LONGEST_HOURS)))
    try:
        yield
        wait_for_all()
    finally:
        _patience -= 1
        if not _patience:
            torch_private.set_timeout(limit)


def stalled() -> Stalled | None:
    """Returns the error about ranks that give no sign of life any more, None while there are none."""
    return _current.stalled() if _current is not None else None


def explained(error: BaseException) -> Stalled | None:
    """Returns the error that stands for a collective's timeout, None for any other error."""
    return _current.timed_out() if _current is not None and TIMED_OUT.search(str(error)) else None
