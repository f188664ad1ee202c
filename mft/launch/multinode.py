"""Several machines in one run (`launch.nnodes`): every machine runs the same command and starts its own
ranks.

One of them serves a store (torch's TCPStore) at the address that all are given: host 0 at
launch.main_address, or the one with the address of launch.rdzv_endpoint, where elastic's c10d rendezvous
numbers the hosts. There they compare what they are about to run, and host 0 publishes the run folder, which
must be on a file system that all of them see (`node_group`). Elastic's own rendezvous would start a store
that listens on every interface.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.launch import network, node_group, torch_private

if TYPE_CHECKING:
    from mft.config.schema import Launch


def join(settings: Launch, facts: Mapping[str, Any]) -> node_group.NodeGroup:
    """Returns this machine among the `launch.nnodes` of the run, once all are there and agree on `facts`.

    Raises UserError, soon after `launch.join_seconds` at the latest, when they do not come together.
    """
    static = settings.main_address is not None
    name, _, digits = node_group.endpoint(settings).rpartition(":")
    port = int(digits)
    key = f"launch.main_address={name}" if static else f"launch.rdzv_endpoint={name}:{port}"
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"{key}: unknown host {name} ({error.strerror}).") from None
    own = network.interfaces()
    serves = settings.node_rank == 0 if static else address in own
    local = settings.local_addr or (address if serves else network.route(address, port))
    if serves and address not in own:
        raise UserError(f"{key} must be an address of host 0 (launch.node_rank=0): {', '.join(own)}.")
    if local not in own:
        raise UserError(f"launch.local_addr={local} must be an address of this machine: {', '.join(own)}.")
    # torch warns about every host name it cannot look up
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    server = None
    if serves:
        try:
            server = network.serve_store(address, port)
        except OSError as error:
            # of several processes of one machine with c10d, the first one serves
            if static or error.errno != errno.EADDRINUSE:
                raise UserError(f"{key}, port {port}: cannot listen there ({error.strerror}).") from None
    # before torch connects, whose wait for the store Ctrl-C does not end
    if server is None and (refusal := network.await_listener(address, port, settings.join_seconds)):
        raise node_group.too_few(1, settings, f": {refusal.strerror or refusal}")
    number = settings.node_rank if static else _number((address, port), local, settings)
    assert number is not None
    group = node_group.NodeGroup((address, port), server, number, local, settings)
    group.require_agreement(facts)
    return group


def _number(address: tuple[str, int], local: str, settings: Launch) -> int:
    """Returns this host's number in the order of arrival."""
    from torch.distributed.elastic.rendezvous import RendezvousError

    store = network.connect(address)
    store.add("joined", 1)
    try:
        return torch_private.number_hosts(store, settings.nnodes, local, settings.join_seconds)
    except RendezvousError as error:
        # a host that left and came again counts twice
        raise node_group.too_few(min(store.add("joined", 0), settings.nnodes - 1), settings) from error
