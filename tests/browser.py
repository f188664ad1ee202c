"""A headless Chromium for tests, driven through its DevTools protocol over a pair of pipes; needs no
driver."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no chromium on this machine (apt-get install chromium)"


class Page:
    """One page. errors: what its console complained of; requests: the addresses it asked for."""

    def __init__(self, commands: int, events: int):
        self.commands, self.events = commands, events
        self.rest, self.number, self.session = b"", 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, url: str, width: int = 1600, height: int = 1200, offline: bool = False) -> None:
        """Goes to an address, in a window that is high enough for what pages draw only where it can be
        seen."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        if offline:
            rates = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            self.send("Network.emulateNetworkConditions", offline=True, **rates)
        self.send("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def js(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 120) -> Any:
        """Waits until an expression is true, and returns it; fails with the text of the page otherwise."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(expression)):
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"never true: {expression}\n{self.js('document.body.innerText')}\n{self.errors}"
                )
            time.sleep(0.3)
        return value

    def picture(self, path: Path) -> Path:
        """Writes a PNG of the page."""
        path.write_bytes(
            base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        )
        return path

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls the browser and returns its answer; what it tells in the meantime is kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 120
        while True:
            while b"\0" not in self.rest:
                ready, _, _ = select.select([self.events], [], [], max(0.0, deadline - time.monotonic()))
                part = os.read(self.events, 1 << 20) if ready else b""
                assert part, f"{method}: the browser is gone or does not answer"
                self.rest += part
            text, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str(params["args"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(str(params["entry"])[:500])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


@contextmanager
def page(profile: Path) -> Iterator[Page]:
    """A page of a fresh browser whose files lie in `profile`."""
    assert CHROMIUM is not None, MISSING
    from_us, commands = os.pipe()
    events, to_us = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--mute-audio",
    ]

    def place() -> None:  # it reads commands from 3 and writes to 4; both may be taken by each other
        source, sink = os.dup(from_us), os.dup(to_us)
        os.dup2(source, 3)
        os.dup2(sink, 4)

    browser = subprocess.Popen(
        [CHROMIUM, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=place,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(profile)},
    )
    os.close(from_us)
    os.close(to_us)
    try:
        yield Page(commands, events)
    finally:
        os.close(commands)  # which ends it
        os.close(events)
        browser.terminate()
        try:
            browser.wait(20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait(20)
