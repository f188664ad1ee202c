"""Processes that take turns: each computes one step when asked, and reports its CPU time and memory.

The parent writes a line for each step to a worker's input; the worker answers with a line of JSON. Standard
library alone: it runs in the environments of the peers, too.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def resident(field: str) -> float:
    """Returns VmRSS (now) or VmHWM (the highest since it was reset) of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def read_mapped_weights() -> None:
    """Reads the weights that this process has mapped from a file: until then they are not in its memory."""
    populate = 22  # MADV_POPULATE_READ of Linux 5.14; older ones refuse it
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, stop = (int(address, 16) for address in line.split()[0].split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), populate)


class Turns:
    """The worker's side."""

    def __init__(self) -> None:
        # libraries print to standard output: from here on that is the log
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.begun = False

    def step_done(self, **found: Any) -> None:
        """Reports a step and waits for the next turn; the first call reports that the lane is ready.

        With it come `seconds`, CPU seconds of the process since the turn began, and `memory`, MiB: the peak
        since the first turn above what the process held then.
        """
        seconds = time.process_time()
        if self.begun:
            found |= {"seconds": seconds - self.started, "memory": resident("VmHWM") - self.held}
        else:
            # neither what loading has left behind is the step's, nor weights that it is the first to read
            gc.collect()
            read_mapped_weights()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.held, self.begun = resident("VmRSS"), True
        self.answers.write(json.dumps(found) + "\n")
        if not sys.stdin.readline():
            os._exit(0)  # enough steps: what a run does at its end is not measured
        self.started = time.process_time()


class Lane:
    """The parent's side: a worker that is ready for its first step."""

    def __init__(self, name: str, python: Path, module: str, arguments: Sequence[str], log: Path):
        """module: of this package; log: what the worker prints. RuntimeError where it cannot start."""
        self.name, self.log = name, log
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [str(python), "-m", f"benchmarks.peers.{module}", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | ONE_THREAD | OFFLINE,
                cwd=Path(__file__).parents[2],
            )
        self.facts = self._answer()

    def step(self) -> dict[str, Any]:
        """Lets the worker compute one step; returns what it reports."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the worker."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        printed = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        raise RuntimeError("\n".join([f"{self.name} has ended:", *printed]))
