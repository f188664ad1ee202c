"""Where the machines of a run come together: at a given address, or through torch's c10d rendezvous."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from mft.config.schema import Launch
from mft.errors import UserError
from mft.launch.hosts import Hosts, client


def meet(settings: Launch, facts: Mapping[str, Any]) -> Hosts:
    """Returns this machine among the `launch.nnodes` of the run, once all are there and agree on `facts`.

    With launch.main_address the host of node_rank 0 serves there; with launch.rdzv_endpoint the machine with that
    address does, and torch's c10d rendezvous numbers the hosts. Raises UserError when they do not come together.
    """
    if settings.main_address is not None:
        name, port = settings.main_address, settings.main_port
        serves, said = settings.node_rank == 0, f"launch.main_address={name}"
    else:
        assert settings.rdzv_endpoint is not None
        name, _, digits = settings.rdzv_endpoint.rpartition(":")
        port, said = int(digits), f"launch.rdzv_endpoint={settings.rdzv_endpoint}"
        serves = _resolve(name, said) in _interfaces()
    address = _resolve(name, said)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns about every host name it cannot look up
    store = _serve(address, port, said, settings.main_address is None) if serves else None
    store = store or _connect(address, port, said, settings.join_seconds)
    local = settings.local_addr or (address if serves else _route(address, port))
    if local not in _interfaces():
        raise UserError(f"launch.local_addr={local} is no address of this machine: {', '.join(sorted(_interfaces()))}.")
    rank = settings.node_rank if settings.main_address is not None else _number(store, local, settings, said)
    assert rank is not None
    hosts = Hosts(store, rank, (address, port), (local, _interfaces()[local]), settings)
    hosts.agree(facts)
    return hosts


def _number(store: Any, local: str, settings: Launch, said: str) -> int:
    """Returns this host's number by torch's c10d rendezvous, which sees to hosts that came and went before all came."""
    from datetime import timedelta

    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # it would serve another store, on every interface
    timeout = RendezvousTimeout(join=timedelta(seconds=settings.join_seconds))
    count, backend = settings.nnodes, C10dRendezvousBackend(store, "mft")
    handler = DynamicRendezvousHandler.from_backend("mft", store, backend, count, count, local, timeout)
    try:
        return handler.next_rendezvous().rank
    except RendezvousError as error:
        raise UserError(
            f"launch.nnodes={count}: not all hosts came to {said} ({error or type(error).__name__})."
        ) from None
    finally:
        handler._stop_heartbeats()  # the hosts' own ones take over; `shutdown` would close it for slower hosts


def _serve(address: str, port: int, said: str, optional: bool) -> Any:
    """Returns a store that listens on this one address; torch by itself would listen on every interface.

    optional: None where another process of this machine listens there already.
    """
    from torch.distributed import PrefixStore, TCPStore

    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if optional and error.errno == errno.EADDRINUSE:
            return None
        known = ", ".join(sorted(_interfaces()))
        raise UserError(
            f"{said}, port {port}: host 0 cannot serve there ({error.strerror}); this machine's addresses: {known}."
        ) from None
    served = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return PrefixStore("mft/hosts", served)


def _connect(address: str, port: int, said: str, seconds: int) -> Any:
    """Returns a connection to host 0's store, once it is there."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=5):
                return client(address, port)
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(f"{said}, port {port}: host 0 does not answer there ({error}).") from None
        time.sleep(0.5)


def _resolve(name: str, said: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"{said}: {name} is no host that this machine knows ({error.strerror}).") from None


def _interfaces() -> dict[str, str]:
    """Returns the interface of every address of this machine."""
    import psutil

    return {address.address: name for name, found in psutil.net_if_addrs().items() for address in found}


def _route(address: str, port: int) -> str:
    """Returns the address of this machine from which it reaches another; sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])
