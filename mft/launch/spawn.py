"""Starts the ranks of a run: forked from a server with the heavy imports done, watched by torch's elastic
agent.

The server lives as long as this process, so the second and later jobs of a sweep start in well under a
second.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.distributed.accelerator import RANK_VARIABLES
from mft.hardware import has_gpu, quiet_without_gpu
from mft.launch import failures, network, torch_private, worker
from mft.launch.node_group import NodeGroup
from mft.launch.signals import INTERRUPTED, SAVED, UNSAVED, Stopped, first_signal, held_back

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousInfo

PRELOAD = (
    "mft.launch.worker",
    "omegaconf",
    "torch",
    "accelerate",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "peft",
    "mft.run",
    "matplotlib.figure",
)
"""Modules the fork server imports once. None may initialise CUDA: forked workers could not use a GPU."""

TOUCHES_CUDA = ("peft", "bitsandbytes", "deepspeed")
"""Left out of the preload where there is a GPU: peft imports bitsandbytes, which asks every GPU for its
capability, and deepspeed may ask when it looks for its accelerator."""

EXIT_BARRIER_SECONDS = 1.0
"""How long elastic's agent waits for other hosts once its ranks are done; `NodeGroup.close` waits longer, and
knows which of them have left."""


def spawn(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    nproc: int,
    log: Path,
    shutdown_seconds: int = 600,
    nodes: NodeGroup | None = None,
) -> dict[int, Any]:
    """Calls function(*arguments) in nproc ranks on this machine; returns what each returned, by rank.

    function must be importable by name; log: folder for the ranks' logs and error reports; shutdown_seconds:
    how long ranks may save after a signal; nodes: the machines whose ranks make one group with these. Raises
    as `launch`.
    """
    if nodes is None:
        failures.forget_failures(log)
    else:  # host 0 removes them, once for all
        nodes.log = log
    start_fork_server()  # first, so that its imports run beside our own
    with held_back():  # torch's C++ code aborts the process where a signal interrupts its import
        from torch.distributed.elastic.agent.server import WorkerSpec
        from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    info = loopback() if nodes is None else nodes.rendezvous()
    spec = WorkerSpec(
        role="default",
        local_world_size=nproc,
        rdzv_handler=torch_private.completed_rendezvous(info),
        entrypoint=worker.rank_main,
        args=(str(log), function, tuple(arguments), environment(nodes)),
        max_restarts=0,  # the same command resumes a failed run, the agent never does
    )
    torch_private.quiet_agent()
    no_logs = DefaultLogsSpecs(log_dir=os.devnull)  # each rank writes its own

    # The agent asks: what a handler raises is lost where Python cannot raise, as in the hooks of a fork.
    with first_signal(lambda signum: None) as received:
        result = torch_private.run_agent(
            LocalElasticAgent(
                spec, no_logs, start_method(), EXIT_BARRIER_SECONDS, shutdown_timeout=shutdown_seconds
            ),
            asked=lambda: received[0] if received else 0,
        )
    if received or result is None:
        raise Stopped(received[0], 128 + received[0])
    if not result.is_failed():
        return dict(result.return_values)
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    if stopped := {code for code in codes.values() if code in (SAVED, INTERRUPTED, UNSAVED)}:
        # the ranks were signalled, this process was not
        raise Stopped(signal.SIGINT if INTERRUPTED in stopped else signal.SIGTERM, max(stopped))
    ranks = range(info.rank * nproc, (info.rank + 1) * nproc)
    if nodes is None:
        raise failures.failure_of(log, ranks, codes)
    failure = failures.failure_of(log, ranks, codes, nodes.rank, nodes.lost)
    for rank in ranks:
        report = log / f"rank{rank}.error.json"
        if codes.get(rank, 0) < 0 and not report.exists():  # the other hosts look for the cause, too
            failures.write_report(report, failure, rank)
            break
    raise failure


def start_fork_server(preload: Sequence[str] = PRELOAD) -> None:
    """Starts the fork server if there is none yet, without waiting for its imports. It keeps today's
    environment."""
    if start_method() == "fork":
        return
    # before the server starts: it reads the environment and the list of modules once
    gpu = has_gpu()
    quiet_without_gpu()
    multiprocessing.set_forkserver_preload([name for name in preload if not (gpu and name in TOUCHES_CUDA)])
    # makes torch count GPUs without initialising CUDA
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # torch warns about every host name it cannot look up
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A Ctrl-C in the terminal, and a scheduler, signal the whole process group: the server would die with a
    # traceback, and this process with another one where it asks for a rank. It ends when this process does.
    multiprocessing.resource_tracker.ensure_running()  # first: it changes which signals are blocked
    with held_back():
        multiprocessing.forkserver.ensure_running()


def start_method() -> str:
    """Returns how this process starts ranks: from the fork server, or, where it came from that itself, by
    plain fork.

    Such a process (the supervisor of a job) has the imports already; another fork server would repeat
    them.
    """
    return "forkserver" if multiprocessing.parent_process() is None else "fork"


def environment(nodes: NodeGroup | None = None) -> dict[str, str]:
    """Returns this process's environment for the ranks, which talk over the loopback interface alone.

    With several hosts they talk over the interface that leads to the others. What is set already stays.
    """
    # elastic sets both kinds for each rank; those that an outer torchrun or a batch script exported would win
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TORCHELASTIC_") and name not in RANK_VARIABLES
    }
    if nodes is None:
        interface = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    else:
        interface = nodes.interface
    return (dict.fromkeys(network.INTERFACE_VARIABLES, interface) if interface else {}) | inherited


def loopback() -> RendezvousInfo:
    """Returns the rendezvous of one machine, whose store listens on 127.0.0.1 only, on a port that the kernel
    picks."""
    from torch.distributed import PrefixStore
    from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

    store = network.serve_store("127.0.0.1")
    return RendezvousInfo(PrefixStore("mft", store), 0, 1, RendezvousStoreInfo("127.0.0.1", store.port))
