"""The store that the hosts and ranks of a run share: torch's TCPStore, served by one process of them."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any


def listening_store(address: str, port: int = 0) -> Any:
    """Returns a TCPStore that listens on this one address; torch by itself would listen on every interface.

    port: 0 for one that the kernel picks. Raises OSError where it cannot listen there.
    """
    from torch.distributed import TCPStore

    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    port, minutes = listener.getsockname()[1], timedelta(minutes=15)
    descriptor = listener.detach()
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=minutes, master_listen_fd=descriptor
    )


def connect(address: tuple[str, int]) -> Any:
    """Returns a connection to the store that another process, or this one, serves."""
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return PrefixStore("mft/hosts", store)


def await_listener(address: str, port: int, seconds: float) -> OSError | None:
    """Waits until somebody listens there; returns what connecting failed of where nobody does in time.

    torch's own wait for a store is not interrupted by Ctrl-C, and prints a page of C++ frames when it is
    over.
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
