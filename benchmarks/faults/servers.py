"""Kinds of faults: a tracker's server that is dead, hangs, or answers with something else."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks.faults import damages, moments
from benchmarks.faults.case import Case, Failure

PATIENT_SECONDS = 60.0
"""How much longer than the reference a run with a bad server may take: opening and closing wait 4 s each,
and MLflow is imported."""


LATE = ("in a step", "in a save", "in a validation", "in final/", "in the test")
"""Moments at which the tracker is open."""


class Misbehaving(BaseHTTPRequestHandler):
    """Answers every request in one of the ways below."""

    answers: dict[str, Callable[[Misbehaving], None]]
    behaviour: Callable[[Misbehaving], None]

    def handle_any(self) -> None:
        """Reads the request and behaves."""
        with suppress(OSError):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            type(self).behaviour(self)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = handle_any

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def answer(self, code: int, content: bytes, kind: str = "application/json") -> None:
        """Sends an answer."""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _hang(request: Misbehaving) -> None:
    time.sleep(3600)


def _drip(request: Misbehaving) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000000")
    request.end_headers()
    while True:
        request.wfile.write(b" ")
        time.sleep(0.5)


def _cut(request: Misbehaving) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{")


def _late(request: Misbehaving) -> None:
    time.sleep(2)
    request.answer(503, b"{}")


BEHAVIOURS: dict[str, Callable[[Misbehaving], None]] = {
    "answers 500": lambda request: request.answer(500, b"Internal Server Error", "text/html"),
    "answers 404": lambda request: request.answer(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}'),
    "answers 401": lambda request: request.answer(401, b"who are you?"),
    "answers 429": lambda request: request.answer(429, b""),
    "sends a web page": lambda request: request.answer(200, b"<html>Welcome</html>", "text/html"),
    "sends other JSON": lambda request: request.answer(200, json.dumps({"run": None, "runs": 3}).encode()),
    "sends null": lambda request: request.answer(200, b"null"),
    "sends bytes": lambda request: request.answer(200, bytes(range(256)) * 40),
    "cuts its answers": _cut,
    "hangs": _hang,
    "drips": _drip,
    "is late": _late,
}


def bad_server(case: Case) -> None:
    """A server that fails, lies, hangs or is not there: the run neither waits nor fails, and says it."""
    behaviour = case.draw.choice(["is not there", *BEHAVIOURS])
    case.strike(f"the tracker's server {behaviour}")
    with_server(case, behaviour, lambda: case.end(case.start()))
    case.expects.append(r"mft tracking sync")


def server_for_resume(case: Case) -> None:
    """The same for a run that was killed before and is resumed beside such a server."""
    damages.killed(case)
    bad_server(case)


def with_server(case: Case, behaviour: str, act: Callable[[], int]) -> None:
    """Calls `act` while a server behaves so; Failure where that takes long, or fails."""
    server = None
    if behaviour == "is not there":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    else:
        handler = type("Handler", (Misbehaving,), {"behaviour": staticmethod(BEHAVIOURS[behaviour])})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads, port = True, server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
    case.more += ["tracking=mlflow", f"tracking.mlflow.uri=http://127.0.0.1:{port}"]
    began = time.monotonic()
    try:
        code, took = act(), time.monotonic() - began
    finally:
        if server:
            server.shutdown()
            server.socket.close()
    if code:
        raise Failure("LOST", f"ended with {code} as the server {behaviour}: {case.sentence()}")
    if took > 2 * case.seconds() + PATIENT_SECONDS:
        raise Failure("HUNG", f"took {took:.0f} s as the server {behaviour}")


def server_dies(case: Case) -> None:
    """A real MLflow server is killed at a random moment: `mft tracking sync` sends the rest once it is back."""
    from tests.tracking.server import free_port, kill_server, start_server

    # not in the case's folder, where it would count as a process left behind
    store, port = case.bench.root / "servers" / case.work.name, free_port()
    store.mkdir(parents=True)
    case.more += ["tracking=mlflow", f"tracking.mlflow.uri=http://127.0.0.1:{port}"]
    server = start_server(store, port)
    try:
        moment = moments.draw(case, *LATE)
        command = case.start()
        case.strike(f"the tracker's server was killed {moments.reach(case, command, moment)}")
        kill_server(server)
        if code := case.end(command):
            raise Failure("LOST", f"ended with {code}: {case.sentence()}")
        server = start_server(store, port)
        if code := case.end(case.start(["tracking", "sync", "run"])):
            raise Failure("LOST", f"mft tracking sync ended with {code}: {case.sentence()}")
        case.codes.pop()  # of another command
    finally:
        kill_server(server)


def tracker_files(case: Case) -> None:
    """A file of the trackers, after a run that has MLflow and TensorBoard was killed."""
    case.more += ["tracking=[mlflow,tensorboard]"]
    command = case.start()
    command.until((case.run / "checkpoints" / "step-4").is_dir)
    command.send_group(signal.SIGKILL)
    case.end(command, anything=True)
    found = [path for path in damages.files(case.run) if path.name.startswith(("mlflow.", "events."))]
    found += [path for path in case.work.glob("mlflow.db*") if path.is_file()]
    if found:
        damages.damage(case, case.draw.choice(found))
