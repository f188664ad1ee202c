"""A real `mlflow server` on this machine's loopback interface, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_server(
    store: Path, port: int, options: Sequence[str] = (), **variables: str
) -> subprocess.Popen[bytes]:
    """Starts a server over the database in a folder and waits until it answers."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{store}/mlflow.db",
        "--artifacts-destination",
        f"{store}/served",
    ]
    quiet = subprocess.DEVNULL
    env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"} | variables
    process = subprocess.Popen(
        [*command, *options], cwd=store, start_new_session=True, stdout=quiet, stderr=quiet, env=env
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.3)
    raise AssertionError("mlflow server did not start")


def kill_server(process: subprocess.Popen[bytes]) -> None:
    """Ends it and its workers at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
