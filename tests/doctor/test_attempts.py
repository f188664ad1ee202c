"""Libraries that cannot be imported, crash or hang are a line each, and the next attempt is made all the
same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mft.doctor.abilities import judged
from mft.doctor.children import answers
from mft.doctor.finding import Finding, State
from mft.doctor.needs import Needs
from mft.tracking.store import reason


@pytest.fixture
def shadows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules come before those that are installed."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def found(name: str, needs: dict[str, str], **given: object) -> Finding:
    (answer,) = answers([name], {name: given})
    return next(judged(answer, Needs(needs)))


def test_a_library_that_cannot_be_imported_is_a_problem_where_it_is_needed(shadows: Path) -> None:
    (shadows / "peft.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    needed = found("peft", {"peft": "every run"})
    assert needed.state is State.problem and "libcudart.so.12" in needed.found and "pip" in needed.cure
    assert "every run" in needed.found
    assert found("peft", {}).state is State.note


def test_a_crash_and_a_hang_are_answers_and_the_rest_is_tried(shadows: Path) -> None:
    (shadows / "crashing.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (shadows / "exiting.py").write_text("import os, sys; print('no driver', file=sys.stderr); os._exit(3)")
    (shadows / "hanging.py").write_text("import time; time.sleep(60)")
    (shadows / "noisy.py").write_text("print('hello')")
    said = list(answers(["crashing", "noisy", "exiting", "hanging", "json"], {}, seconds=3))
    assert [answer["name"] for answer in said] == ["crashing", "noisy", "exiting", "hanging", "json"]
    errors = [answer.get("error", "") for answer in said]
    assert errors == [
        "its process was ended by SIGSEGV",
        "",
        "its process ended with code 3: no driver",
        "no answer in 3 s",
        "",
    ]


def test_what_raises_is_told_with_its_kind(shadows: Path) -> None:
    (shadows / "broken.py").write_text("1 / 0")
    (answer,) = answers(["broken"], {})
    assert answer == {"name": "broken", "error": "ZeroDivisionError: division by zero"}


def test_ctrl_c_ends_a_library_that_hangs(shadows: Path) -> None:
    hangs = "import os, time, pathlib; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    (shadows / "hanging.py").write_text(hangs)
    lines = (
        "import sys, threading",
        f"sys.path.insert(0, {str(shadows)!r})",
        "from mft.doctor.children import answers",
        "threading.Thread(target=lambda: list(answers(['hanging'], {})), daemon=True).start()",
        "threading.Event().wait()",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    doctor = subprocess.Popen(command, cwd=shadows, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (shadows / "pid").exists() or not (pid := (shadows / "pid").read_text()):
        assert doctor.poll() is None and time.monotonic() < until, "the library was never imported"
        time.sleep(0.05)
    doctor.send_signal(signal.SIGINT)
    doctor.wait(timeout=20)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_no_part_of_a_host_is_left_where_a_message_is_cut() -> None:
    host = "tracker.department.example.internal"
    error = ConnectionError(f"cannot reach {host}" + f" (host={host})" * 9)
    said = reason(error, f"http://{host}", host)
    assert "…" in said and not [word for word in host.split(".") if word in said], said


class Store(BaseHTTPRequestHandler):
    """Answers as an MLflow server whose clock is a minute behind; refuses a wrong password."""

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer()

    def answer(self) -> None:
        refused = "experiments" in self.path and "Basic bWU6cmlnaHQ=" not in str(
            self.headers["Authorization"]
        )
        body = json.dumps(
            {"error_code": "UNAUTHENTICATED", "message": "no"} if refused else {"experiments": []}
        ).encode()
        self.send_response_only(401 if refused else 200)
        self.send_header("Date", formatdate(time.time() - 60, usegmt=True))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_tracker_is_asked_and_neither_its_address_nor_a_password_is_told(
    store: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {"mlflow": "tracking=mlflow"}
    wrong = found("mlflow", needs, uri=f"http://me:wrong@127.0.0.1:{store}")
    assert wrong.state is State.problem and "does not accept the user and password" in wrong.found
    right = found("mlflow", needs, uri=f"http://me:right@127.0.0.1:{store}")
    assert right.state is State.note and re.search("6[0-9] s behind", right.found), right
    dead = found("mlflow", needs, uri="http://me:secret@127.0.0.1:9")
    assert dead.state is State.problem and "mft tracking sync" in dead.cure
    for finding in (wrong, right, dead):
        assert not [word for word in ("secret", "wrong", "127.0.0.1") if word in finding.found], finding
