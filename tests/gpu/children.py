"""Cells in child processes: each one's JSON line is printed as soon as it has ended, however it ended.

The parent has imported what is heavy and never starts CUDA, which no forked process could then use. So a cell
costs no start, leaves nothing behind on the device, and takes no other with it.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mft.hardware import has_gpu
from mft.launch.spawn import PRELOAD, TOUCHES_CUDA

LAST_LINES = 12
"""Of what a child has written that its JSON line quotes where it failed."""

IN_MEMORY, ROOM = "/dev/shm", 40 * 2**30
"""Where a GPU's cells share a folder, and how many bytes must be free there: 7B and 1.2B weights are 16 GB."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal of a process whose parent has ended."""


@dataclass(frozen=True)
class Place:
    """Where cells are played."""

    device: str
    """cuda or cpu."""
    small: bool
    """Whether fewer steps and shorter samples do, as for a CPU twin."""
    folder: Path
    """What the cells of one call share: data, checkpoints, runs."""


@dataclass
class Found:
    """What a cell has measured."""

    values: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    """Each bound that does not hold, in words."""

    def below(self, bounds: Mapping[str, float], of: str = "") -> None:
        """Holds that each value is at most its bound; a NaN is not."""
        for name, bound in bounds.items():
            value = self.values[of + name]
            if not value <= bound:
                self.missed.append(f"{of}{name} is {value:.3g}, at most {bound:g} was expected")

    def holds(self, true: object, otherwise: str) -> None:
        """Holds a fact."""
        if not true:
            self.missed.append(otherwise)


@dataclass(frozen=True)
class Cell:
    """One thing to be shown."""

    name: str
    """Its row in docs/gpu.md, and which of that row: "A5 zero3 lora fp32"."""
    run: Callable[[Place], Found]
    """Shows it, in a child."""
    seconds: int = 60
    """How long it may take on a GPU, a CPU twin ten times as long: it may run beside anything."""
    twin: str = "long"
    """Which tests play it on a CPU: quick (`make test`), long (`make check-all`), "" (none: it needs a GPU)."""
    on_cpu: bool = False
    """Whether the GPU is hidden from it: a reference. It runs beside the cells before those that need it."""
    after: tuple[str, ...] = ()
    """Names of the references that it needs."""


@dataclass
class Playing:
    """A child that plays a cell."""

    cell: Cell
    child: int
    began: float
    folder: Path

    def finish(self) -> dict[str, Any]:
        """Waits for the child; returns its line, and leaves no process of it."""
        try:
            os.waitpid(self.child, 0)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.child, signal.SIGKILL)
        seconds = round(time.perf_counter() - self.began, 2)
        line: dict[str, Any] = {"cell": self.cell.name, "passed": False, "seconds": seconds}
        try:
            line |= json.loads((self.folder / "line").read_text())
        except OSError:
            line["error"] = "ended without a result, by a signal or since its time was up"
        if "error" in line:
            line["log"] = (self.folder / "log").read_text(errors="replace").splitlines()[-LAST_LINES:]
        shutil.rmtree(self.folder)
        return line


def start(cell: Cell, place: Place) -> Playing:
    """Forks a child that plays a cell."""
    sys.stdout.flush()
    folder = Path(tempfile.mkdtemp(prefix="cell-", dir=place.folder))
    (folder / "log").touch()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        _play(cell, place, folder)
    return Playing(cell, child, began, folder)


def _play(cell: Cell, place: Place, folder: Path) -> NoReturn:
    os.setpgrp()  # no session: what ends that of the parent ends this child
    with suppress(OSError, AttributeError):  # a parent that is killed cannot end its children
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # who reads a terminal in the background is stopped
    os.dup2(log, 1)
    os.dup2(log, 2)
    # also where the main thread waits in a collective for ever; the log then says where
    seconds = cell.seconds * (1 if place.device == "cuda" else 10)
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    if cell.on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if (torch := sys.modules.get("torch")) and (cell.on_cpu or place.device == "cpu"):
        torch.set_num_threads(1)  # others run beside it
    try:
        assert not torch or not torch.cuda._is_in_bad_fork(), "an import of the parent has started CUDA"
        found = cell.run(place)
        line: dict[str, Any] = {"passed": not found.missed, "found": found.values}
        line |= {"missed": found.missed} if found.missed else {}
        text = json.dumps(finite(line), allow_nan=False)
    except BaseException as error:
        traceback.print_exc()
        text = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
    (folder / "line.new").write_text(text)
    (folder / "line.new").rename(folder / "line")
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def finite(value: Any) -> Any:
    """Returns a value with words for numbers that JSON lacks: nan, inf."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def play(cells: Sequence[Cell], place: Place, until: float = float("inf")) -> Iterator[dict[str, Any]]:
    """Yields the line of each cell as soon as it has ended; those not begun by `until` (`time.monotonic`) are
    left out in a line that says so."""
    references = {cell.name: cell for cell in cells if cell.on_cpu}
    beside: dict[str, Playing] = {}
    try:
        if place.device == "cuda":  # the CPU has nothing else to do
            beside = {name: start(cell, place) for name, cell in references.items()}
        for cell in cells:
            if cell.on_cpu and beside:
                continue
            for name in cell.after:
                if playing := beside.pop(name, None):
                    yield playing.finish()
            if time.monotonic() > until:
                yield {"cell": cell.name, "passed": False, "error": "not begun: the time was up"}
                continue
            yield start(cell, place).finish()
        for name in list(beside):
            yield beside.pop(name).finish()
    finally:
        for playing in beside.values():
            with suppress(ProcessLookupError):
                os.killpg(playing.child, signal.SIGKILL)
            os.waitpid(playing.child, 0)


def chosen(cells: Sequence[Cell], words: Iterable[str]) -> list[Cell]:
    """Returns the cells whose names begin with one of the words (all without any), and what they need."""
    words = tuple(words)
    wanted = [cell for cell in cells if not words or any(f"{cell.name} ".startswith(f"{w} ") for w in words)]
    needed = {name for cell in wanted for name in cell.after}
    return [cell for cell in cells if cell in wanted or cell.name in needed]


@contextmanager
def shared_folder(device: str) -> Iterator[Path]:
    """Yields a folder, in memory where the device is a GPU and there is room: models of many gigabytes are
    written there."""
    where = None
    if device == "cuda":
        with suppress(OSError):  # a container's may have 64 MiB
            where = IN_MEMORY if shutil.disk_usage(IN_MEMORY).free >= ROOM else None
    with tempfile.TemporaryDirectory(prefix="mft-gpu-", dir=where) as folder:
        yield Path(folder)


def imported(device: str) -> None:
    """Imports what is heavy, without starting CUDA."""
    # torch would ask CUDA for devices, and DeepSpeed torch, when they are imported
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ["DS_ACCELERATOR"] = "cuda" if device == "cuda" else "cpu"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in (*PRELOAD, "deepspeed", "hydra"):
        if device == "cuda" and name in TOUCHES_CUDA:
            continue
        with suppress(ImportError):  # of what a machine lacks; the cell that needs it says so
            importlib.import_module(name)


def main(
    cells: Sequence[Cell],
    about: str | None,
    minutes: float,
    report: Callable[[list[dict[str, Any]]], str] | None = None,
) -> int:
    """The command line of a list of cells; returns the exit code. report: what is printed of all lines."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", "--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"no cell begins after that time ({minutes:g} on a GPU; no limit on a CPU)",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="first words of names of cells")
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    given = parser.parse_args()
    wanted = [c for c in chosen(cells, given.only) if given.device == "cuda" or c.twin]
    if given.list or not wanted:
        print(
            "\n".join(cell.name for cell in wanted)
            or "no cell has a name that begins so; --list alone names all"
        )
        return 0 if wanted else 2
    if given.device == "cuda" and not has_gpu() and not shutil.which("nvidia-smi"):
        print("no GPU is here; --device cpu --small plays the twins")
        return 2
    limit = given.minutes or (minutes if given.device == "cuda" else math.inf)
    until = time.monotonic() + 60 * limit
    imported(given.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that children end, and the folder is removed
    lines = []
    with shared_folder(given.device) as folder:
        for line in play(wanted, Place(given.device, given.small, folder), until):
            print(json.dumps(line), flush=True)
            lines.append(line)
    if report:
        print(report(lines))
    return 0 if all(line["passed"] for line in lines) else 1
