"""What mft/launch/torch_private.py uses of torch is there, and does what it did in the version it was read
in."""

from __future__ import annotations

import importlib
import inspect
import logging
import operator
import os
import threading

import pytest
import torch

from mft.launch import torch_private as private
from mft.launch.network import connect, serve_store
from mft.launch.spawn import loopback

GONE = f"in torch {torch.__version__}: see mft/launch/torch_private.py, read in {private.READ_IN}"
ELASTIC = "torch.distributed.elastic"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.cuda", "_is_in_bad_fork"),
        (f"{ELASTIC}.rendezvous.static_tcp_rendezvous", "StaticTCPRendezvous"),
        (f"{ELASTIC}.rendezvous.c10d_rendezvous_backend", "C10dRendezvousBackend"),
        (f"{ELASTIC}.rendezvous.dynamic_rendezvous", "create_handler"),
        (f"{ELASTIC}.agent.server.local_elastic_agent", "LocalElasticAgent._monitor_workers"),
    ],
)
def test_names(module: str, name: str) -> None:
    found = operator.attrgetter(name)
    try:
        found(importlib.import_module(module))
    except AttributeError:
        raise AssertionError(f"{module}.{name} is gone {GONE}") from None


@pytest.mark.parametrize(
    ("module", "variable"),
    [
        (f"{ELASTIC}.multiprocessing.api", "TORCHELASTIC_SIGNALS_TO_HANDLE"),
        (f"{ELASTIC}.rendezvous.dynamic_rendezvous", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
    ],
)
def test_variables(module: str, variable: str) -> None:
    source = inspect.getsource(importlib.import_module(module))
    assert variable in source, f"{module} no longer reads {variable} {GONE}"


def test_this_process_was_not_forked_from_one_with_cuda() -> None:
    assert private.forked_after_cuda() is False, GONE


def test_the_agent_leaves_signals_and_reports_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_SIGNALS_TO_HANDLE", raising=False)
    importlib.import_module(f"{ELASTIC}.agent.server.local_elastic_agent")
    private.quiet_agent()
    assert os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] == "SIGQUIT"
    loggers = [name for name in logging.root.manager.loggerDict if name.startswith(private.LOGGERS)]
    assert len(loggers) > 3, f"elastic's loggers have other names {GONE}"
    assert all(not logging.getLogger(name).isEnabledFor(logging.CRITICAL) for name in loggers)


def test_a_completed_rendezvous_is_taken_as_it_is() -> None:
    info = loopback()
    handler = private.completed_rendezvous(info)
    assert handler.next_rendezvous() is info and handler.num_nodes_waiting() == 0, GONE
    assert handler.use_agent_store, GONE


def test_two_hosts_are_numbered() -> None:
    server = serve_store("127.0.0.1")
    numbers: list[int] = []

    def come() -> None:
        store = connect(("127.0.0.1", server.port))
        numbers.append(private.number_hosts(store, 2, "127.0.0.1", seconds=30))

    hosts = [threading.Thread(target=come) for _ in range(2)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(60)
    assert sorted(numbers) == [0, 1], GONE
