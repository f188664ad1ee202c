"""Worker processes of this command: forked from a server with the heavy imports done, watched by torch's elastic agent.

The server lives as long as this process, so the second and later jobs of a sweep start in well under a second.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mft.hardware import DRIVERS, quiet_without_gpu
from mft.launch import worker
from mft.launch.failures import WorkerError, failure_of, forget_failures, write_report
from mft.launch.hosts import IFNAMES, Hosts

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

__all__ = ["PRELOAD", "Stopped", "WorkerError", "handlers", "start", "warm"]

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
"""Left out of the preload where there is a GPU: peft imports bitsandbytes, which asks every GPU for its capability, and
deepspeed may ask when it looks for its accelerator."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the process is to leave with `code` (see `mft.launch.worker.exit_code`).

    A KeyboardInterrupt and no Exception, so that nothing on the way (Hydra) takes it for one failed job of a sweep and
    starts the next.
    """

    def __init__(self, signum: int, code: int):
        super().__init__(signum, code)
        self.signum = signum
        self.code = code


def start(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    nproc: int,
    reports: Path,
    shutdown_seconds: int = 600,
    preload: Sequence[str] = PRELOAD,
    hosts: Hosts | None = None,
) -> dict[int, Any]:
    """Calls function(*arguments) in nproc ranks on this machine; returns what each returned, by its number here.

    function must be importable by name; reports: folder for the ranks' logs and error reports; hosts: the machines
    whose ranks make one group with these. Raises as `launch`.
    """
    if hosts is None:
        forget_failures(reports)
    else:
        hosts.watch(reports)
    warm(preload)  # first, so that the server's imports run beside our own
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    register_loopback()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="mft",
        rdzv_backend="loopback",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        max_restarts=0,
        start_method=start_method(),
        signals_to_handle="SIGQUIT",  # the others are ours
        shutdown_timeout=shutdown_seconds,
    )
    silence_elastic()
    first = hosts.rank * nproc if hosts else 0
    try:
        with signals_end_workers(SignalException):
            return elastic_launch(config, worker.enter)(
                str(reports), function, tuple(arguments), variables(hosts, nproc), first
            )
    except SignalException as error:
        raise Stopped(error.sigval, 128 + error.sigval) from None
    except ChildFailedError as error:
        codes = {first + rank: failure.exitcode for rank, failure in error.failures.items()}
    stopped = {code for code in codes.values() if code in (worker.SAVED, worker.INTERRUPTED, worker.UNSAVED)}
    if stopped:  # the ranks were signalled, this process was not
        raise Stopped(signal.SIGINT if worker.INTERRUPTED in stopped else signal.SIGTERM, max(stopped))
    ranks = range(first, first + nproc)
    failure = failure_of(reports, ranks, codes, hosts)
    died = [rank for rank in ranks if codes.get(rank, 0) < 0 and not (reports / f"rank{rank}.error.json").exists()]
    if hosts is not None and died:  # the other hosts look for the cause, too
        write_report(reports / f"rank{died[0]}.error.json", failure, died[0])
    raise failure


def warm(preload: Sequence[str] = PRELOAD) -> None:
    """Starts the fork server if there is none yet, without waiting for its imports. Its environment is today's."""
    if start_method() == "fork":
        return
    gpu = any(path.exists() for path in DRIVERS)
    quiet_without_gpu()
    multiprocessing.set_forkserver_preload([name for name in preload if not (gpu and name in TOUCHES_CUDA)])
    # torch then counts GPUs without initialising CUDA; and does not warn about every host name it cannot look up
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    multiprocessing.forkserver.ensure_running()


def start_method() -> str:
    """Returns how this process starts ranks: from the fork server, or, where it came from that itself, by plain fork.

    Such a process (the supervisor of a job) has the imports already; a fork server of its own would do them again.
    """
    return "forkserver" if multiprocessing.parent_process() is None else "fork"


def variables(hosts: Hosts | None = None, nproc: int = 1) -> dict[str, str]:
    """Returns this process's environment for the workers, which talk over the loopback interface alone.

    With several hosts they talk over the interface that leads to the others, and are one group.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    if hosts is not None:
        ours = hosts.variables(nproc)
        return found | ours | {name: found[name] for name in ours if name.endswith("_IFNAME") and name in found}
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    return found | {name: found.get(name, loopback) for name in IFNAMES if loopback}


@contextmanager
def signals_end_workers(exception: type[Exception]) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP lets elastic pass it on to the workers and wait; a second one ends at once.

    At once is safe: each worker's watchdog sees this process gone.
    """
    asked: list[int] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked:
            os._exit(128 + signum)
        asked.append(signum)
        raise exception(f"signal {signum}", signal.Signals(signum))

    with handlers(ask):
        yield


@contextmanager
def handlers(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handles SIGINT, SIGTERM and SIGHUP by `handler` inside the block; outside the main thread it does nothing."""
    try:
        before = {
            name: signal.signal(name, handler) for name in worker.SIGNALS if signal.getsignal(name) != signal.SIG_IGN
        }
    except ValueError:  # signal only works in main thread
        before = {}
    quit_before = signal.getsignal(signal.SIGQUIT)
    try:
        yield
    finally:
        for name, old in before.items():
            signal.signal(name, old)
        if before:
            signal.signal(signal.SIGQUIT, quit_before)  # elastic leaves its own behind


def silence_elastic() -> None:
    """Keeps elastic's own account of a failure off the terminal: the rank's report says it better."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def register_loopback() -> None:
    """Registers the rendezvous of one machine, `loopback`, with elastic."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    if "loopback" not in rendezvous_handler_registry._registry:
        rendezvous_handler_registry.register("loopback", loopback)


def loopback(parameters: RendezvousParameters) -> RendezvousHandler:
    """Returns a rendezvous whose store listens on 127.0.0.1 only, on a port that the kernel picks.

    torch's own (static, c10d) listen on every interface, where anybody who reaches the port could talk to the ranks.
    """
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

    class Loopback(RendezvousHandler):
        def __init__(self) -> None:
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            self.info = RendezvousStoreInfo("127.0.0.1", port)
            self.store = TCPStore(
                "127.0.0.1",
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=900),
                master_listen_fd=listener.detach(),
            )

        def get_backend(self) -> str:
            return "loopback"

        @property
        def use_agent_store(self) -> bool:
            return True

        def next_rendezvous(self) -> RendezvousInfo:
            return RendezvousInfo(PrefixStore(parameters.run_id, self.store), 0, 1, self.info)

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            pass

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return parameters.run_id

        def shutdown(self) -> bool:
            return True

    return Loopback()
