"""Network addresses of this machine, and the TCPStore that the hosts and ranks of a run share."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name the network interface over which ranks talk."""


def interfaces() -> dict[str, str]:
    """Returns {address: name of its network interface} of this machine."""
    import psutil

    return {item.address: name for name, items in psutil.net_if_addrs().items() for item in items}


def route(address: str, port: int) -> str:
    """Returns the address from which this machine reaches another one; sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])


def serve_store(address: str, port: int = 0) -> TCPStore:
    """Returns a TCPStore that listens on this one address; torch by itself would listen on every interface.

    port: 0 for one that the kernel picks. Raises OSError where it cannot listen there, or be reached.
    """
    from torch.distributed import DistError, TCPStore

    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    port = listener.getsockname()[1]
    descriptor = listener.detach()  # the store closes it, so the socket object must not
    soon = timedelta(seconds=10)  # it is here; where no more files may be open torch would try for long
    try:
        store = TCPStore(
            address, port, is_master=True, wait_for_workers=False, timeout=soon, master_listen_fd=descriptor
        )
    except DistError as error:
        raise OSError(f"the store at {address} cannot be reached: {str(error).splitlines()[0]}") from error
    store.set_timeout(timedelta(minutes=15))
    return store


def connect(address: tuple[str, int]) -> Store:
    """Returns a connection to the store that another process, or this one, serves."""
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return PrefixStore("mft/hosts", store)


def await_listener(address: str, port: int, seconds: float) -> OSError | None:
    """Waits until a process listens there; returns the last refusal where none does in time.

    torch's own wait for a store does not react to Ctrl-C, and prints a page of C++ frames when it times out.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=min(5, seconds)).close()
            return None
        except OSError as error:
            if time.monotonic() > deadline:
                return error
        time.sleep(0.5)
