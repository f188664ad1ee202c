"""What launching uses of torch beside its public interface, as it was in 2.13.0.

Underscored names, modules and variables that torch's documentation does not describe, and the names of its
loggers are used here alone. tests/launch/test_torch_private.py fails, and says which, where one is gone.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.elastic.agent.server import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo

READ_IN = "2.13.0"
"""The version in which this was read."""

LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
"""Loggers that report the failure of a rank; the rank's own report is shorter and names the cause."""


def forked_after_cuda() -> bool:
    """Whether this process was forked from one that had initialised CUDA, so that it can use no GPU."""
    import torch

    return torch.cuda._is_in_bad_fork()


def quiet_agent() -> None:
    """Keeps elastic's agent from handling SIGINT, SIGTERM and SIGHUP, and from logging failures.

    torch.distributed.launcher sets the variable for `torchrun --signals-to-handle`; the agent reads it. It
    must name a signal, so it gets the one that nobody sends to end a run in good order.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(LOGGERS):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def run_agent(agent: LocalElasticAgent, asked: Callable[[], int]) -> RunResult | None:
    """Runs elastic's agent to the end of its ranks; returns None when it has ended them for a signal.

    asked: the signal that asks to end them, 0 for none. The agent is asked each time it looks after its
    ranks, ten times a second, by the private method that its loop calls for it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    look_after = agent._monitor_workers

    def look_after_unless_asked(group: WorkerGroup) -> RunResult:
        if signum := asked():  # the agent passes the signal of this exception on, and waits
            raise SignalException(f"signal {signum}", signal.Signals(signum))
        return look_after(group)

    agent._monitor_workers = look_after_unless_asked  # type: ignore[method-assign]
    try:
        return agent.run()
    except SignalException:
        return None


def completed_rendezvous(info: RendezvousInfo) -> RendezvousHandler:
    """Returns the handler, as elastic's agent wants one, of a rendezvous that has already taken place.

    The public base class has eight abstract methods; the static handler implements all but the one below as
    an agent without restarts needs them.
    """
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Completed(StaticTCPRendezvous):
        def next_rendezvous(self) -> RendezvousInfo:
            return info

    return Completed("", 0, info.rank, info.world_size, "mft", timeout=0)


def number_hosts(store: Store, hosts: int, local_address: str, seconds: int) -> int:
    """Returns this host's number by elastic's c10d rendezvous, which tolerates hosts that leave and rejoin.

    Raises RendezvousError when fewer than `hosts` come together in so many seconds.
    """
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    # otherwise the handler starts a second store, which listens on every interface
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    parameters = RendezvousParameters("c10d", "", "mft", hosts, hosts, local_address, join_timeout=seconds)
    return create_handler(store, C10dRendezvousBackend(store, "mft"), parameters).next_rendezvous().rank
