"""Ports, the name of this host, and the hub: what a run needs of the network beside its tracker."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mft.doctor.finding import Finding, Part
from mft.doctor.needs import Needs
from mft.doctor.places import hub_cache

PATIENCE = 5.0
"""Seconds that a name service or the hub gets to answer."""

LOOPBACK = "127.0.0.1"

part = Part("network")


def findings(cfg: DictConfig | None, needs: Needs) -> Iterator[Finding]:
    """Yields a line for the loopback, the port of the run, the host's name and the hub."""
    yield _loopback()
    if cfg is not None and needs.of("port") and cfg.launch.node_rank == 0:
        yield port(str(cfg.launch.main_address), int(cfg.launch.main_port))
    yield _host_name(needs.of("host name"))
    yield _hub(needs.of("hub"))


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns call(), the exception that it raised, or a TimeoutError."""
    answer: list[Any] = [TimeoutError("no answer")]

    def keep() -> None:
        try:
            answer[0] = call()
        except Exception as error:
            answer[0] = error

    # A daemon: the name service of the system cannot be interrupted.
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def _loopback() -> Finding:
    try:
        with socket.socket() as listener:
            listener.bind((LOOPBACK, 0))
            listener.listen()
            socket.create_connection(listener.getsockname(), timeout=PATIENCE).close()
    except OSError as error:
        cure = "let processes of this machine talk to each other over 127.0.0.1"
        return part.problem("loopback", f"no connection to {LOOPBACK}: {error.strerror or error}", cure)
    return part.ok("loopback", f"a port of {LOOPBACK} takes connections")


def port(address: str, number: int) -> Finding:
    """Returns whether this machine, number 0 of several, can listen on launch.main_port."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, number))
            listener.listen()
    except OSError as error:
        found = f"{number} cannot be listened on: {error.strerror or error}"
        return part.problem("launch.main_port", found, "choose a free one with launch.main_port=…")
    return part.ok("launch.main_port", f"{number} is free")


def _host_name(needed: str) -> Finding:
    answer = _within(PATIENCE, lambda: socket.getaddrinfo(socket.gethostname(), None))
    if not isinstance(answer, Exception):
        return part.ok("host name", "resolves to an address")
    found, cure = "does not resolve to an address", "add this machine to /etc/hosts"
    if needed:
        return part.problem("host name", f"{found}; needed by {needed}", f"{cure}, or set launch.local_addr")
    return part.note("host name", f"{found}; ranks of one machine do without", cure)


def _hub(needed: str) -> Finding:
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    file = Path(os.environ.get("HF_TOKEN_PATH") or hub_cache().parent / "token")
    about = f"a token is {'there' if token or file.is_file() else 'not there'}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return part.note("hub", f"offline by HF_HUB_OFFLINE: only what was fetched before is found; {about}")
    own = "HF_ENDPOINT" in os.environ
    answer = _within(PATIENCE, lambda: _status(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"))
    where = "the address of HF_ENDPOINT" if own else "huggingface.co"
    if isinstance(answer, int):
        return part.ok("hub", f"{where} answers; {about}")
    cure = "give folders instead of hub names, or set HF_ENDPOINT to a mirror; HF_HUB_OFFLINE=1 saves waiting"
    found = f"{where} does not answer ({type(answer).__name__}); {about}"
    if needed:
        return part.problem("hub", f"{found}; needed by {needed}, unless it was fetched before", cure)
    return part.note("hub", found, cure)


def _status(address: str) -> int:
    """Returns the HTTP status of a HEAD request, also of a refusal: whoever refuses has answered."""
    import requests

    return int(requests.head(address, timeout=PATIENCE, allow_redirects=False).status_code)
